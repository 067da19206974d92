//! The corpus of `fuzz/`, and thousands of changes of its files, through the function that is fuzzed there: whatever a
//! file holds, it is opened and fitted or refused, and what fits can be merged. A panic fails the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../fuzz/fuzz_targets/opened.rs"]
mod opened;

use std::path::Path;

/// Bytes that stand for something in a header.
const WORDS: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\"",
    b"0",
    b"-1",
    b"1e9",
    b"18446744073709551615",
    b"4611686018427387904",
    b"F16",
    b"BF16",
    b"F32",
    b"U8",
    b".",
    b"_",
    b"lora_up",
    b"lora_A",
    b".alpha",
    b".dora_scale",
    b".lokr_w1",
    b".hada_t1",
    b".diff",
    b"\xff",
    b"\0",
    b"__metadata__",
];

/// A sequence of numbers that is the same everywhere.
struct Sequence(u64);

impl Sequence {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end.max(1)
    }
}

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/opened");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn changed(bytes: &[u8], sequence: &mut Sequence) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=sequence.below(3) {
        let at = sequence.below(bytes.len());
        match sequence.below(5) {
            0 => {
                bytes.truncate(at);
            }
            1 => {
                let word = WORDS[sequence.below(WORDS.len())];
                let end = (at + word.len()).min(bytes.len());
                bytes.splice(at..end, word.iter().copied());
            }
            2 => {
                let end = (at + 1 + sequence.below(16)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = sequence.below(bytes.len());
                bytes.splice(to..to, part);
            }
            3 => {
                let digit = b'0' + sequence.below(10) as u8;
                if let Some(found) = bytes[at..].iter().position(u8::is_ascii_digit) {
                    bytes[at + found] = digit;
                }
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << sequence.below(8);
                }
            }
        }
    }
    // A length prefix that is right lets the change be seen behind it.
    if sequence.below(2) == 0 && bytes.len() > 8 {
        let data = bytes
            .iter()
            .rposition(|byte| *byte == b'}')
            .map_or(0, |at| at.saturating_sub(7));
        bytes[..8].copy_from_slice(&(data as u64).to_le_bytes());
    }
    bytes
}

#[test]
fn files_of_the_corpus_are_opened_or_refused() {
    let files = corpus();
    assert!(files.len() >= 8);
    let good = files
        .iter()
        .filter(|(_, bytes)| opened::check(bytes.clone()))
        .count();
    assert!(good >= 5, "{good} of {} fit the model", files.len());
}

#[test]
fn thousands_of_changes_of_them_too() {
    let files = corpus();
    let mut sequence = Sequence(7);
    let mut good = 0;
    for round in 0..6000 {
        let (name, bytes) = &files[round % files.len()];
        let bytes = changed(bytes, &mut sequence);
        let result = std::panic::catch_unwind(|| opened::check(bytes.clone()));
        let Ok(fits) = result else {
            panic!(
                "round {round}, from {name}: {}",
                String::from_utf8_lossy(&bytes)
            );
        };
        good += usize::from(fits);
    }
    assert!(good > 100, "{good} changed files fit");
}
