//! Malformed weight files: every kind is refused with a reason of its own, and exactly those that the reference
//! implementation refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::safetensors_file::{f32_bytes, raw, well_formed, with_length};
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;
use tronie::Error;
use tronie::weights::Weights;

fn opened(bytes: &[u8]) -> Result<Weights, Error> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Weights::open(&[path])
}

fn reason(result: Result<Weights, Error>) -> String {
    match result {
        Err(Error::Weights { path, reason }) => {
            assert!(path.ends_with("model.safetensors"));
            reason
        }
        other => panic!("an error about weights was expected, not {other:?}"),
    }
}

fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

fn two(first: &str, second: &str) -> String {
    format!(
        r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{first}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#
    )
}

/// Nine tensors whose ranges tile the bytes up to almost 2^64, where adding the header's length overflows.
fn near_the_end_of_the_address_space() -> String {
    let step = (1_u64 << 61) - 1;
    let entry = |i: u64, size: u64| {
        let start = i * step;
        format!(
            r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{}]}}"#,
            start + size
        )
    };
    let mut entries: Vec<String> = (0..8).map(|i| entry(i, step)).collect();
    entries.push(entry(8, 7));
    format!("{{{}}}", entries.join(","))
}

/// What the case is, the file, and what the message must say.
type Case = (&'static str, Vec<u8>, &'static str);

fn assert_refused(cases: &[Case]) {
    for (label, bytes, expected) in cases {
        let found = reason(opened(bytes));
        assert!(
            found.contains(expected),
            "{label}: expected `{expected}` in `{found}`"
        );
        assert!(found.len() < 700, "{label}: {found}");
    }
}

#[test]
#[rustfmt::skip]
fn lying_length_prefixes_are_refused() {
    assert_refused(&[
        ("0 bytes", vec![], "is empty"),
        ("7 bytes", vec![1; 7], "7 bytes, and the format needs at least 8"),
        ("8 bytes, no header", vec![0; 8], "its header is empty"),
        ("8 bytes, header missing", vec![9, 0, 0, 0, 0, 0, 0, 0], "truncated: 17 bytes expected for the header alone, 8 found"),
        ("9 bytes", vec![2, 0, 0, 0, 0, 0, 0, 0, b' '], "truncated: 10 bytes expected for the header alone, 9 found"),
        ("header length 2^64-1", with_length(u64::MAX, b" {}", b""), "a header of 18446744073709551615 bytes"),
        ("header over 100 MB", with_length(100_000_001, b"{}", b""), "the format allows 100000000"),
        ("header one byte past the end", with_length(3, b"{}", b""), "truncated: 11 bytes expected"),
        ("header length 0 with data", with_length(0, b"", &[0; 16]), "its header is empty"),
    ]);
}

#[test]
#[rustfmt::skip]
fn headers_that_are_no_json_object_of_tensors_are_refused() {
    let nested = format!(r#"{{"t":{}"#, "[".repeat(10_000));
    let empty = r#""dtype":"U8","shape":[0],"data_offsets":[0,0]"#;
    assert_refused(&[
        ("not UTF-8", with_length(4, b"{\"\xff\"", b""), "header is not UTF-8 at byte 10"),
        ("not JSON", raw("hello", b""), "header is not valid"),
        ("array", raw("  []", b""), "expected an object with one entry per tensor"),
        ("null", raw("null", b""), "expected an object with one entry per tensor"),
        ("NUL after the object", raw("{}\0", b""), "trailing characters"),
        ("two objects", raw("{}{}", b""), "trailing characters"),
        ("trailing comma", raw(&format!(r#"{{"t":{{{empty}}},}}"#), b""), "trailing comma"),
        ("nested without end", raw(&nested, b""), "tensor `t`"),
        ("metadata of numbers", raw(r#"{"__metadata__":{"a":1}}"#, b""), "invalid type: integer `1`, expected a string"),
        ("no dtype", raw(r#"{"t":{"shape":[],"data_offsets":[0,0]}}"#, b""), "tensor `t`: missing field `dtype`"),
        ("unknown dtype", raw(&one("F31", "[2]", "[0,8]"), &[0; 8]), "tensor `t`: unknown variant `F31`"),
        ("negative dimension", raw(&one("F32", "[-2]", "[0,8]"), &[0; 8]), "tensor `t`: invalid value: integer `-2`"),
        ("fractional dimension", raw(&one("F32", "[2.0]", "[0,8]"), &[0; 8]), "tensor `t`: invalid type: floating point"),
        ("dimension 1e30", raw(&one("F32", "[1e30]", "[0,8]"), &[0; 8]), "tensor `t`: invalid type: floating point"),
        ("dimension 2^64", raw(&one("F32", "[18446744073709551616]", "[0,8]"), &[0; 8]), "tensor `t`: invalid type"),
        ("one offset", raw(&one("F32", "[2]", "[0]"), &[0; 8]), "tensor `t`: invalid length 1"),
        ("equal names", raw(&format!(r#"{{"t":{{{empty}}},"t":{{{empty}}}}}"#), b""), "tensor `t` is listed twice"),
        ("equal names, one escaped", raw(&format!(r#"{{"t":{{{empty}}},"\u0074":{{{empty}}}}}"#), b""), "tensor `t` is listed twice"),
    ]);
}

#[test]
#[rustfmt::skip]
fn shapes_and_ranges_that_cannot_be_are_refused() {
    let good = one("F32", "[2]", "[0,8]");
    assert_refused(&[
        ("2^63 elements twice", raw(&one("U8", "[9223372036854775808,2]", "[0,8]"), &[0; 8]), "tensor `t`: shape [9223372036854775808, 2] of U8 is not a whole number of bytes that a file can hold"),
        ("2^62 f32", raw(&one("F32", "[4611686018427387904]", "[0,8]"), &[0; 8]), "is not a whole number of bytes that a file can hold"),
        ("half a byte", raw(&one("F4", "[1]", "[0,1]"), &[0; 1]), "is not a whole number of bytes"),
        ("range too short", raw(&one("F32", "[2]", "[0,4]"), &[0; 4]), "tensor `t`: shape [2] of F32 needs 8 bytes, and its range has 4"),
        ("range too long", raw(&one("F16", "[2]", "[0,8]"), &[0; 8]), "tensor `t`: shape [2] of F16 needs 4 bytes, and its range has 8"),
        ("overlap", raw(&two("[0,4]", "[2,6]"), &[0; 6]), "tensor `b`: its data overlaps the data of tensor `a`"),
        ("same range", raw(&two("[0,4]", "[0,4]"), &[0; 4]), "its data overlaps the data of tensor"),
        ("gap", raw(&two("[0,4]", "[6,10]"), &[0; 10]), "tensor `b`: a gap of 2 bytes lies before its data"),
        ("gap at the beginning", raw(&one("F32", "[2]", "[8,16]"), &[0; 16]), "tensor `t`: a gap of 8 bytes"),
        ("backwards", raw(&one("F32", "[2]", "[8,0]"), &[0; 8]), "ends at byte 0, before it starts at byte 8"),
        ("beyond the file", raw(&good, &[0; 4]), "truncated: 70 bytes expected, 66 found"),
        ("trailing bytes", raw(&good, &[0; 11]), "3 bytes that belong to no tensor follow the data"),
        ("data without tensors", raw("{}", &[0; 4]), "4 bytes that belong to no tensor"),
        ("last offset near 2^64", raw(&near_the_end_of_the_address_space(), b""), "truncated: 18446744073709"),
    ]);
}

#[test]
#[rustfmt::skip]
fn other_formats_are_named_and_never_parsed() {
    assert_refused(&[
        ("pickle", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "is a Python pickle"),
        ("pickle protocol 4", b"\x80\x04\x95\x10\0\0\0\0\0\0\0}".to_vec(), "convert it where you trust its origin"),
        ("zip", b"PK\x03\x04\0\0\x08\x08\0\0".to_vec(), "is a zip archive"),
        ("GGUF", b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "is a GGUF file"),
        ("NumPy", b"\x93NUMPY\x01\0v\0{".to_vec(), "is a NumPy array"),
        ("HDF5", b"\x89HDF\r\n\x1a\n\0\0".to_vec(), "is an HDF5 file"),
        ("ONNX", b"\x08\x0a\x12\x07pytorch".to_vec(), "is an ONNX model: give it as a graph"),
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\0".to_vec(), "is a gzip file"),
        ("web page", b"<!DOCTYPE html><html>".to_vec(), "is a web page"),
        ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "git lfs pull"),
        ("index of shards", br#"{"metadata":{},"weight_map":{}}"#.to_vec(), "list the .safetensors shards"),
    ]);
}

/// A header of 640 bytes has the first bytes of a pickle.
#[test]
fn a_length_prefix_that_looks_like_another_format_is_no_obstacle() {
    let header = format!("{:640}", one("F32", "[2]", "[0,8]"));
    let file = raw(&header, &[0; 8]);
    assert_eq!(file[..2], [0x80, 2]);
    assert_eq!(opened(&file).unwrap().names().collect::<Vec<_>>(), ["t"]);
}

#[test]
fn names_from_a_file_are_escaped_and_cut_in_messages() {
    let name = format!("\u{202e}{}", "x".repeat(1_000_000));
    let header =
        format!(r#"{{"\u0000{name}\n":{{"dtype":"U8","shape":[1],"data_offsets":[0,2]}}}}"#);
    let found = reason(opened(&raw(&header, &[0; 2])));
    assert!(found.contains(r"`\0\u{202e}xxx"), "{found}");
    assert!(found.len() < 400);
}

#[test]
fn a_file_cut_anywhere_is_refused_as_truncated() {
    let values = f32_bytes(&[1.5; 300]);
    let bytes = well_formed(
        &[
            ("first.weight", "F32", &[10, 10], &values[..400]),
            ("second", "F16", &[400], &values[400..]),
        ],
        0,
    );
    opened(&bytes).unwrap();
    for cut in 0..bytes.len() {
        let found = reason(opened(&bytes[..cut]));
        let expected = match cut {
            0 => "is empty",
            1..8 => "the format needs at least 8",
            _ => "truncated",
        };
        assert!(found.contains(expected), "cut at {cut}: {found}");
    }
}

/// Whether the reference implementation takes the file. It may overflow, which counts as no.
fn reference(bytes: &[u8]) -> Option<SafeTensors<'_>> {
    std::panic::catch_unwind(|| SafeTensors::deserialize(bytes).ok()).unwrap_or_default()
}

fn assert_agrees_with_the_reference(bytes: &[u8]) -> Result<(), TestCaseError> {
    match (opened(bytes), reference(bytes)) {
        (Ok(ours), Some(theirs)) => {
            prop_assert_eq!(ours.names().count(), theirs.len());
            for (name, view) in theirs.iter() {
                let mine = ours.get(name).unwrap();
                prop_assert_eq!(
                    (mine.dtype, mine.shape, mine.bytes),
                    (view.dtype(), view.shape(), view.data())
                );
            }
        }
        (Err(_), None) => {}
        (Err(Error::Weights { reason, .. }), Some(_)) => {
            prop_assert!(reason.contains("listed twice"), "{}", reason);
        }
        (ours, theirs) => prop_assert!(false, "{:?} and {:?}", ours, theirs.is_some()),
    }
    Ok(())
}

fn sample() -> Vec<u8> {
    well_formed(
        &[
            ("a.b", "F32", &[2, 2], &[1; 16]),
            ("c", "BF16", &[3], &[2; 6]),
            ("d", "U8", &[], &[3]),
            ("e", "F16", &[0], &[]),
        ],
        0,
    )
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        assert_agrees_with_the_reference(&bytes)?;
    }

    #[test]
    fn random_headers_never_panic(header in "[\\[\\]{}\",:a0-9tdeshp_ofuF.-]{0,120}", data in 0_usize..40) {
        assert_agrees_with_the_reference(&raw(&header, &vec![0; data]))?;
    }

    #[test]
    fn changed_files_are_taken_exactly_when_the_reference_takes_them(
        edits in proptest::collection::vec((8_usize..260, proptest::sample::select(&b"0123456789[]{},:\" abcdFU\xff"[..])), 1..4),
        cut in proptest::option::of(0_usize..280),
    ) {
        let mut bytes = sample();
        for (at, byte) in edits {
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        assert_agrees_with_the_reference(&bytes)?;
    }
}
