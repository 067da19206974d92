//! Noise against torch's CPU generator, bit for bit, and its resumption.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use tronie::noise::{Noise, NoisePosition};
use tronie::tensor::Latents;

#[derive(Deserialize)]
struct Golden {
    runs: BTreeMap<String, Run>,
}

#[derive(Deserialize)]
struct Run {
    seed: u64,
    draws: Vec<Draw>,
}

#[derive(Deserialize)]
struct Draw {
    shape: [usize; 4],
    sha256: String,
    first_bits: Vec<u32>,
}

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/noise.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn bits(values: &Latents) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn sha256(values: &Latents) -> String {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let digits: Vec<_> = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    digits.concat()
}

#[test]
fn every_golden_run_is_equal_bit_for_bit() {
    let golden = golden();
    assert!(golden.runs.len() >= 10);
    for (name, run) in golden.runs {
        let mut noise = Noise::new(run.seed);
        for (i, draw) in run.draws.iter().enumerate() {
            let values = noise.normal(draw.shape);
            let first: Vec<u32> = bits(&values).into_iter().take(16).collect();
            assert_eq!(first, draw.first_bits, "{name}, draw {i}: first values");
            assert_eq!(sha256(&values), draw.sha256, "{name}, draw {i}");
        }
    }
}

#[test]
fn a_replayed_generator_goes_on_bit_for_bit() {
    for (name, run) in golden().runs {
        for cut in 0..run.draws.len() {
            let mut unbroken = Noise::new(run.seed);
            for draw in &run.draws[..cut] {
                unbroken.normal(draw.shape);
            }
            let saved = serde_json::to_string(&unbroken.position()).unwrap();
            let mut resumed = Noise::replay(serde_json::from_str(&saved).unwrap()).unwrap();
            assert_eq!(resumed, unbroken, "{name}, cut at {cut}");
            for draw in &run.draws[cut..] {
                assert_eq!(
                    bits(&resumed.normal(draw.shape)),
                    bits(&unbroken.normal(draw.shape)),
                    "{name}, cut at {cut}"
                );
            }
        }
    }
}

#[test]
fn only_the_low_half_of_a_seed_counts() {
    let shape = [1, 4, 8, 8];
    let five = Noise::new(5).normal(shape);
    assert_eq!(bits(&five), bits(&Noise::new((1 << 32) + 5).normal(shape)));
    assert_ne!(bits(&five), bits(&Noise::new(6).normal(shape)));
}

#[test]
fn an_empty_tensor_draws_nothing() {
    let mut noise = Noise::new(1);
    assert_eq!(noise.normal([0, 4, 8, 8]).len(), 0);
    assert_eq!(noise, Noise::new(1));
}

#[test]
fn a_damaged_position_is_an_error() {
    let sound = NoisePosition {
        seed: 1,
        draws: 0,
        spare: None,
    };
    for damaged in [
        NoisePosition {
            draws: u64::MAX,
            ..sound
        },
        NoisePosition {
            spare: Some(f64::NAN.to_bits()),
            ..sound
        },
    ] {
        let message = Noise::replay(damaged).unwrap_err().to_string();
        assert!(message.contains("seed"), "{message}");
    }
}
