//! Files from the hub: fetched once, found in the cache afterwards, and laid out so that Python finds them too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::hub_cache::{blobs, content, file, get, gets, hub, hub_with, reason, repository};
use crate::hub_server::{COMMIT, Reply, Server, described, large_file, sha256};
use tempfile::TempDir;
use tronie::hub::{Hub, HubOptions, Phase, Transfer};
use tronie::manifest::HubFile;
use tronie::weights::Weights;

/// A hub that knows the file and a storage that has it, as for the hub's large files.
fn hub_and_storage() -> (Server, Server) {
    let storage = Server::start(|seen| large_file(seen, &content()));
    let location = format!("{}/storage?signature=abc", storage.url);
    let server = Server::start(move |_| {
        described(
            Reply::new(302, b"").with("Location", &location),
            &sha256(&content()),
            content().len(),
        )
    });
    (server, storage)
}

#[test]
fn a_large_file_is_laid_out_like_in_any_hub_cache() {
    let (server, _storage) = hub_and_storage();
    let cache = TempDir::new().unwrap();
    let mut seen = vec![];
    let path = hub(&server, &cache)
        .resolve(&file("unet/model.safetensors"), &mut |t: &Transfer<'_>| {
            assert_eq!((t.repo, t.file), ("some/model", "unet/model.safetensors"));
            seen.push((t.phase, t.done, t.total));
            Ok(())
        })
        .unwrap();
    assert_eq!(
        path,
        repository(&cache)
            .join("snapshots")
            .join(COMMIT)
            .join("unet/model.safetensors")
    );
    assert_eq!(fs::read(&path).unwrap(), content());
    assert_eq!(blobs(&cache), [sha256(&content())]);
    assert_eq!(
        fs::read_to_string(repository(&cache).join("refs/main")).unwrap(),
        COMMIT
    );
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(&path).unwrap(),
        Path::new("../../../blobs").join(sha256(&content()))
    );
    assert_eq!(
        Weights::open(&[path]).unwrap().get("w").unwrap().shape,
        [600_000]
    );
    assert_progress_is_whole(&seen);
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_storage() {
    let (server, storage) = hub_and_storage();
    let cache = TempDir::new().unwrap();
    let options = HubOptions {
        token: Some("hf_secret".into()),
        ..HubOptions::default()
    };
    get(
        &hub_with(&server, &cache, options),
        &file("unet/model.safetensors"),
    )
    .unwrap();
    let asked: Vec<_> = server
        .requests()
        .into_iter()
        .map(|r| (r.method, r.path, r.token.unwrap()))
        .collect();
    let request = |method: &str| {
        (
            method.to_owned(),
            "/some/model/resolve/main/unet/model.safetensors".to_owned(),
            "Bearer hf_secret".to_owned(),
        )
    };
    assert_eq!(asked, [request("HEAD"), request("GET")]);
    let fetched: Vec<_> = storage
        .requests()
        .into_iter()
        .map(|r| (r.method, r.token))
        .collect();
    assert_eq!(fetched, [("GET".to_owned(), None)]);
}

fn assert_progress_is_whole(seen: &[(Phase, u64, Option<u64>)]) {
    assert!(seen.is_sorted_by_key(|(phase, done, _)| (*phase == Phase::Verifying, *done)));
    let total = content().len() as u64;
    assert!(seen.contains(&(Phase::Receiving, total, Some(total))));
    assert_eq!(seen.last(), Some(&(Phase::Verifying, total, Some(total))));
}

#[test]
fn a_cached_file_needs_no_request_and_no_server() {
    let server = Server::start(|seen| large_file(seen, &content()));
    let cache = TempDir::new().unwrap();
    let path = get(&hub(&server, &cache), &file("w")).unwrap();
    server.requests();
    assert_eq!(get(&hub(&server, &cache), &file("w")).unwrap(), path);
    let offline = HubOptions {
        offline: true,
        ..HubOptions::default()
    };
    assert_eq!(
        get(&hub_with(&server, &cache, offline.clone()), &file("w")).unwrap(),
        path
    );
    let found = reason(get(&hub_with(&server, &cache, offline), &file("absent")));
    assert!(
        found.contains("is not in the cache") && found.contains("HF_HUB_OFFLINE"),
        "{found}"
    );
    assert!(found.contains("hf download some/model absent"), "{found}");
    assert_eq!(server.requests().len(), 0);
    let by_commit = HubFile {
        repo: "some/model".into(),
        file: "w".into(),
        revision: Some(COMMIT.into()),
    };
    assert_eq!(get(&hub(&server, &cache), &by_commit).unwrap(), path);
    assert_eq!(server.requests().len(), 0);
}

#[cfg(unix)]
#[test]
fn a_cache_made_by_python_is_used() {
    let cache = TempDir::new().unwrap();
    let root = repository(&cache);
    let (blob, snapshot) = (
        root.join("blobs/d670460b4b4aece5915caf5c68d12f560a9fe3e4"),
        root.join("snapshots").join(COMMIT),
    );
    for folder in [
        root.join("blobs"),
        root.join("refs/refs/pr"),
        snapshot.join("tokenizer"),
    ] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(blob, b"{}").unwrap();
    fs::write(root.join("refs/refs/pr/1"), format!("{COMMIT}\n")).unwrap();
    let link = snapshot.join("tokenizer/vocab.json");
    std::os::unix::fs::symlink(
        "../../../blobs/d670460b4b4aece5915caf5c68d12f560a9fe3e4",
        &link,
    )
    .unwrap();
    let options = HubOptions {
        cache_dir: Some(cache.path().into()),
        offline: true,
        ..HubOptions::default()
    };
    let file = HubFile {
        repo: "some/model".into(),
        file: "tokenizer/vocab.json".into(),
        revision: Some("refs/pr/1".into()),
    };
    assert_eq!(get(&Hub::new(options).unwrap(), &file).unwrap(), link);
}

#[test]
fn a_small_file_and_a_renamed_repository_work() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/some/model/resolve/refs%2Fpr%2F1/a%20b.json" => {
            Reply::new(307, b"").with("Location", "/new/name/x?y=1")
        }
        "/new/name/x?y=1" => {
            let etag = "W/\"d670460b4b4aece5915caf5c68d12f560a9fe3e4\"";
            Reply::new(200, b"{}")
                .with("ETag", etag)
                .with("X-Repo-Commit", COMMIT)
        }
        _ => Reply::new(404, b""),
    });
    let cache = TempDir::new().unwrap();
    let file = HubFile {
        repo: "some/model".into(),
        file: "a b.json".into(),
        revision: Some("refs/pr/1".into()),
    };
    let options = HubOptions {
        token: Some("t".into()),
        ..HubOptions::default()
    };
    let path = get(&hub_with(&server, &cache, options), &file).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"{}");
    assert_eq!(blobs(&cache), ["d670460b4b4aece5915caf5c68d12f560a9fe3e4"]);
    assert_eq!(
        fs::read_to_string(repository(&cache).join("refs/refs/pr/1")).unwrap(),
        COMMIT
    );
    assert!(
        server.requests().iter().all(|seen| seen.token.is_some()),
        "the same host may see the token"
    );
}

#[test]
fn eight_at_once_cause_one_transfer() {
    let server = Server::start(|seen| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        large_file(seen, &content())
    });
    let cache = TempDir::new().unwrap();
    let (waited, paths) = (AtomicUsize::new(0), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut note = |transfer: &Transfer<'_>| {
                    waited.fetch_add(
                        usize::from(transfer.phase == Phase::Waiting),
                        Ordering::Relaxed,
                    );
                    Ok(())
                };
                let path = hub(&server, &cache).resolve(&file("w"), &mut note).unwrap();
                paths.lock().unwrap().push(path);
            });
        }
    });
    assert!(
        paths
            .into_inner()
            .unwrap()
            .iter()
            .all(|path| fs::read(path).unwrap() == content())
    );
    assert_eq!(gets(&server).len(), 1);
    assert!(waited.into_inner() > 0);
}

#[test]
fn a_run_that_died_before_the_link_is_completed_without_a_transfer() {
    let server = Server::start(|seen| large_file(seen, &content()));
    let cache = TempDir::new().unwrap();
    let path = get(&hub(&server, &cache), &file("w")).unwrap();
    fs::remove_dir_all(repository(&cache).join("snapshots")).unwrap();
    fs::remove_dir_all(repository(&cache).join("refs")).unwrap();
    server.requests();
    assert_eq!(get(&hub(&server, &cache), &file("w")).unwrap(), path);
    assert_eq!(gets(&server), []);
    // A link whose blob has gone, and a blob that has rotted behind its link.
    fs::remove_file(repository(&cache).join("blobs").join(sha256(&content()))).unwrap();
    assert_eq!(get(&hub(&server, &cache), &file("w")).unwrap(), path);
    assert_eq!(gets(&server), [None]);
    fs::remove_dir_all(repository(&cache).join("snapshots")).unwrap();
    fs::write(
        repository(&cache).join("blobs").join(sha256(&content())),
        b"rot",
    )
    .unwrap();
    assert_eq!(
        fs::read(get(&hub(&server, &cache), &file("w")).unwrap()).unwrap(),
        content()
    );
}
