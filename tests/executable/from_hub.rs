//! A model whose files lie in a hub repository: downloaded once, then used from the cache.

use std::path::Path;

use crate::hub_server::{Reply, Seen, Server, large_file};
use crate::workshop::Workshop;

const REPO: &str = "studio/tiny";

/// Serves the tiny model's files as the hub serves a repository.
fn serve(root: std::path::PathBuf) -> Server {
    Server::start(move |seen: &Seen| {
        let file = seen.path.strip_prefix(&format!("/{REPO}/resolve/main/"));
        match file.map(|f| std::fs::read(root.join(f))) {
            Some(Ok(content)) => large_file(seen, &content),
            _ => Reply::new(404, b""),
        }
    })
}

/// Makes the catalogue's tiny entry name files of the repository.
fn point_to_hub(w: &Workshop) {
    let path = w.path("models.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let remote = |line: &str| {
        let (before, file) = line.split_once("tiny/").unwrap();
        format!("{before}{{repo: {REPO}, file: {file}}}")
    };
    let lines = text.lines().map(|line| {
        if line.contains(" tiny/") {
            remote(line)
        } else {
            line.to_owned()
        }
    });
    std::fs::write(path, lines.collect::<Vec<_>>().join("\n")).unwrap();
}

fn generate(w: &Workshop, server: &Server, cache: &Path, output: &str) -> std::process::Output {
    let arguments = [
        "generate", "a sailor", "--model", "tiny", "--steps", "4", "--seed", "3",
    ];
    let mut command = w.tronie(&[&arguments[..], &["--output", output]].concat());
    command
        .env("HF_ENDPOINT", &server.url)
        .env("HF_HUB_CACHE", cache);
    command.output().unwrap()
}

#[test]
fn a_model_in_a_hub_repository_is_downloaded_once_and_paints_the_same() {
    let w = Workshop::new();
    let local = w.generate(&["--output", "local.png"]);
    assert!(local.status.success());
    let originals = tempfile::tempdir().unwrap();
    let root = originals.path().join("tiny");
    std::fs::rename(w.path("tiny"), &root).unwrap();
    point_to_hub(&w);
    let server = serve(root);
    let cache = w.path("cache");
    for round in ["downloaded.png", "cached.png"] {
        let output = generate(&w, &server, &cache, round);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let same =
            std::fs::read(w.path("local.png")).unwrap() == std::fs::read(w.path(round)).unwrap();
        assert!(same, "{round} differs");
        assert_eq!(server.requests().is_empty(), round == "cached.png");
    }
}

#[test]
fn a_hub_file_that_is_not_there_is_named() {
    let w = Workshop::new();
    point_to_hub(&w);
    let server = serve(w.path("nowhere"));
    let output = generate(&w, &server, &w.path("cache"), "a.png");
    w.assert_fails(&output, 4, &[REPO, "tokenizer/vocab.json"]);
}
