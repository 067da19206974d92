//! Expansions among threads and processes: one writes, the others wait; what a killed one leaves is cleaned away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/expansions.rs"]
mod expansions;
#[path = "support/safetensors_file.rs"]
mod safetensors_file;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Barrier;

use expansions::{Seen, Shop, patterns};
use tronie::Error;
use tronie::weights::{Expanding, ExpansionCache, Weights};

/// Set for a child process: its weight file, its cache's folder, and what it does when it writes.
const CHILD: [&str; 3] = ["EXPANSION_FILE", "EXPANSION_FOLDER", "EXPANSION_WRITING"];

/// This program once more, expanding `file`.
fn child(shop: &Shop, file: &Path, writing: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "what_a_child_process_does", "--nocapture"])
        .env(CHILD[0], file)
        .env(CHILD[1], shop.cache.folder().unwrap())
        .env(CHILD[2], writing)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// Does nothing unless it is run by [`child`]. It says `writing` when it begins to, and `error: …` if it fails.
#[test]
fn what_a_child_process_does() {
    let (Ok(file), Ok(folder), Ok(writing)) = (
        std::env::var(CHILD[0]),
        std::env::var(CHILD[1]),
        std::env::var(CHILD[2]),
    ) else {
        return;
    };
    let mut weights = Weights::open(&[std::path::PathBuf::from(file)]).unwrap();
    let cache = ExpansionCache::at(folder).with_smallest(1);
    let outcome = cache.expand(&mut weights, ["h"], &mut |event| {
        if let Expanding::Writing { done: 1.., .. } = event {
            println!("\nwriting");
            std::io::stdout().flush().unwrap();
            if writing == "until the line is read" {
                std::io::stdin().read_line(&mut String::new()).unwrap();
            }
        }
        Ok(())
    });
    match outcome {
        Ok(()) => assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped()),
        Err(error) => println!("\nerror: {error}"),
    }
}

/// Starts a child and returns when it holds a temporary file with contents.
/// Its output has to stay open.
fn writing_child(shop: &Shop, file: &Path) -> (Child, BufReader<ChildStdout>) {
    let mut running = child(shop, file, "until the line is read").spawn().unwrap();
    let mut output = BufReader::new(running.stdout.take().unwrap());
    assert!(output.by_ref().lines().any(|l| l.unwrap() == "writing"));
    assert!(shop.cache.unfinished_bytes() > 0);
    (running, output)
}

#[test]
fn threads_that_start_together_write_one_file() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (count, start) = (6, Barrier::new(6));
    let seen: Vec<_> = std::thread::scope(|scope| {
        let run = || {
            start.wait();
            let (weights, seen) = shop.expanded(&file);
            assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
            seen
        };
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let wrote = seen.iter().filter(|s| s.contains(&Seen::Writing)).count();
    assert_eq!(wrote, 1, "{seen:?}");
    assert_eq!(shop.entries().len(), 1);
}

#[test]
fn a_second_process_waits_for_the_first_and_uses_its_file() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (mut first, _output) = writing_child(&shop, &file);
    // It is being written, so nobody may take it for what a killed run has left.
    assert!(!shop.cache.remove_unfinished().unwrap());
    assert!(shop.cache.unfinished_bytes() > 0);
    let mut waited = 0;
    let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
    shop.cache
        .expand(&mut weights, ["h"], &mut |event| {
            assert_ne!(Seen::of(&event), Seen::Writing);
            if Seen::of(&event) == Seen::Waiting {
                waited += 1;
                if waited == 2 {
                    let mut input = first.stdin.take().unwrap();
                    writeln!(input, "go on").unwrap();
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(first.wait().unwrap().success());
    assert!(waited >= 2);
    let plain = Weights::open(&[file]).unwrap();
    let read = |w: &Weights| w.tensor_f32("h", &[256, 256]).unwrap();
    let (disk, memory) = (read(&weights), read(&plain));
    let bits = |v: &f32| v.to_bits();
    assert!(
        disk.as_slice()
            .iter()
            .map(bits)
            .eq(memory.as_slice().iter().map(bits))
    );
    assert_eq!(shop.cache.unfinished_bytes(), 0);
}

#[test]
fn waiting_can_be_cancelled() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (mut first, _output) = writing_child(&shop, &file);
    let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
    let outcome = shop
        .cache
        .expand(&mut weights, ["h"], &mut |event| match Seen::of(&event) {
            Seen::Waiting => Err(Error::Cancelled { step: 0 }),
            _ => Ok(()),
        });
    assert!(matches!(outcome, Err(Error::Cancelled { .. })));
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn what_a_killed_run_leaves_is_removed_by_the_next() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (mut first, _output) = writing_child(&shop, &file);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(shop.entries().is_empty());
    assert!(shop.cache.unfinished_bytes() > 0);
    let (_, seen) = shop.expanded(&file);
    assert_eq!(seen, [Seen::Hashing, Seen::Writing]);
    assert_eq!(shop.cache.unfinished_bytes(), 0);
    assert_eq!(shop.entries().len(), 1);
}

#[test]
fn what_a_killed_run_leaves_can_be_removed_by_hand() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (mut first, _output) = writing_child(&shop, &file);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(shop.cache.remove_unfinished().unwrap());
    assert_eq!(shop.cache.unfinished_bytes(), 0);
}

/// A limit on the length of files stops a write in its middle, as a full disk does.
#[cfg(unix)]
#[test]
fn a_write_that_fails_half_way_leaves_nothing_and_says_what_is_needed() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let plain = child(&shop, &file, "");
    let mut limited = Command::new("sh");
    // 64 blocks of 512 bytes; the signal that comes with the error is ignored.
    limited
        .args(["-c", r#"trap "" XFSZ; ulimit -f 64; exec "$@""#, "sh"])
        .arg(plain.get_program())
        .args(plain.get_args())
        .envs(plain.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = text.lines().find(|line| line.starts_with("error: "));
    let error = error.unwrap_or_else(|| panic!("{text}"));
    for part in ["524", "bytes) are needed", "TRONIE_CACHE", "weights/"] {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    assert!(shop.entries().is_empty());
    assert_eq!(shop.cache.unfinished_bytes(), 0);
    let names = fs::read_dir(shop.cache.folder().unwrap()).unwrap();
    let names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
    assert!(
        names.iter().all(|n| n == "lock" || n == "sources"),
        "{names:?}"
    );
}
