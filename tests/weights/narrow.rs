//! Weights for graphs that compute in f16: in place where the file is f16, rounded where it is wider, never to infinity.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use crate::safetensors_file::{f32_bytes, well_formed};
use half::{bf16, f16};
use tempfile::TempDir;
use tronie::Error;
use tronie::weights::{Change, Weights};

fn u16_bytes(values: impl IntoIterator<Item = u16>) -> Vec<u8> {
    values.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn opened(bytes: &[u8]) -> Weights {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Weights::open(&[path]).unwrap()
}

fn bits(values: &[f16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn reason(error: Error) -> String {
    match error {
        Error::Weights { reason, .. } => reason,
        other => panic!("an error about weights was expected, not {other:?}"),
    }
}

#[test]
fn f16_is_used_where_it_lies_in_the_file() {
    let every = (0..=u16::MAX).collect::<Vec<_>>();
    let bytes = u16_bytes(every.iter().copied());
    let weights = opened(&well_formed(&[("t", "F16", &[256, 256], &bytes)], 0));
    let data = weights.tensor_f16("t", &[256, 256]).unwrap();
    assert!(data.is_mapped());
    assert_eq!(
        data.as_ptr().cast(),
        weights.get("t").unwrap().bytes.as_ptr()
    );
    assert_eq!(bits(data.as_slice()), every);
    assert_eq!(data.shape(), [256, 256]);
    drop(weights);
    assert_eq!(bits(data.clone().as_slice()), every);
}

#[test]
fn misaligned_f16_is_copied_bit_by_bit() {
    let every = (0..=u16::MAX).collect::<Vec<_>>();
    let bytes = u16_bytes(every.iter().copied());
    for misalign in [1, 3] {
        let weights = opened(&well_formed(&[("t", "F16", &[65536], &bytes)], misalign));
        let data = weights.tensor_f16("t", &[65536]).unwrap();
        assert!(!data.is_mapped());
        assert_eq!(bits(data.as_slice()), every);
    }
}

#[test]
fn wider_values_round_to_nearest() {
    let wide = (0..200_000_u32)
        .map(|i| f32::from_bits(i.wrapping_mul(21_467)))
        .filter(|v| v.abs() < 65_504.0)
        .collect::<Vec<_>>();
    let brains = (0..=u16::MAX)
        .map(bf16::from_bits)
        .filter(|v| v.to_f32().abs() < 65_504.0)
        .collect::<Vec<_>>();
    let brain_bytes = u16_bytes(brains.iter().map(|v| v.to_bits()));
    let weights = opened(&well_formed(
        &[
            ("f", "F32", &[wide.len()], &f32_bytes(&wide)),
            ("b", "BF16", &[brains.len()], &brain_bytes),
        ],
        0,
    ));
    let found = weights.tensor_f16("f", &[wide.len()]).unwrap();
    let expected = wide.iter().map(|v| f16::from_f32(*v).to_bits());
    assert_eq!(bits(found.as_slice()), expected.collect::<Vec<_>>());
    let found = weights.tensor_f16("b", &[brains.len()]).unwrap();
    let expected = brains
        .iter()
        .map(|v| f16::from_f32(v.to_f32()).to_bits())
        .collect::<Vec<_>>();
    assert_eq!(bits(found.as_slice()), expected);
}

#[test]
fn a_value_beyond_f16_is_an_error_that_names_its_tensor() {
    let mut values = vec![1.0; 100_000];
    values[77_777] = -70_000.0;
    let weights = opened(&well_formed(
        &[
            ("ff.weight", "F32", &[100_000], &f32_bytes(&values)),
            (
                "fine",
                "F32",
                &[3],
                &f32_bytes(&[65_504.0, f32::INFINITY, f32::NAN]),
            ),
            ("i", "I32", &[1], &[0; 4]),
        ],
        0,
    ));
    let found = reason(weights.tensor_f16("ff.weight", &[100_000]).unwrap_err());
    for part in ["`ff.weight`", "-70000", "65504", "another provider"] {
        assert!(found.contains(part), "{found}");
    }
    // What is infinite in the file is no overflow.
    let fine = weights.tensor_f16("fine", &[3]).unwrap();
    assert_eq!(fine.as_slice()[0], f16::MAX);
    assert!(fine.as_slice()[1].is_infinite() && fine.as_slice()[2].is_nan());
    assert!(reason(weights.tensor_f16("i", &[1]).unwrap_err()).contains("is stored as I32"));
    assert!(reason(weights.tensor_f16("fine", &[4]).unwrap_err()).contains("[4] expected"));
}

/// Adds to every value.
#[derive(Debug)]
struct More(f32);

impl Change for More {
    fn apply(&self, values: &mut [f32], _: &[usize]) -> Result<(), Error> {
        for value in values {
            *value += self.0;
        }
        Ok(())
    }
}

#[test]
fn a_changed_tensor_is_narrowed_too() {
    let mut weights = opened(&well_formed(&[("t", "F16", &[2], &u16_bytes([0, 0]))], 0));
    weights.change("t", Arc::new(More(2.5))).unwrap();
    let data = weights.tensor_f16("t", &[2]).unwrap();
    assert_eq!(data.as_slice(), [f16::from_f32(2.5); 2]);
    weights.change("t", Arc::new(More(1e6))).unwrap();
    assert!(reason(weights.tensor_f16("t", &[2]).unwrap_err()).contains("1000002.5"));
}
