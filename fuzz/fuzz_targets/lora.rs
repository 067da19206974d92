//! Fuzzes the header reader, the key mapper and the merge: `cargo +nightly fuzz run lora fuzz/corpus/opened`.
#![no_main]

mod opened;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    opened::check(bytes.to_vec());
});
