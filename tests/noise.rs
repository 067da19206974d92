//! Noise against torch's CPU generator, bit for bit, and its resumption.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use tronie::noise::{Noise, NoiseKind, NoisePosition};
use tronie::tensor::Latents;

#[derive(Deserialize)]
struct Golden {
    runs: BTreeMap<String, Run>,
    half: BTreeMap<String, Run>,
    each: BTreeMap<String, Run>,
    cuda: BTreeMap<String, CudaRun>,
}

#[derive(Deserialize)]
struct CudaRun {
    seed: u64,
    draws: Vec<CudaDraw>,
}

#[derive(Deserialize)]
struct CudaDraw {
    count: usize,
    first: Vec<f32>,
    last: Vec<f32>,
}

#[derive(Deserialize)]
struct Run {
    #[serde(default)]
    seed: u64,
    /// Of several generators.
    #[serde(default)]
    seeds: Vec<u64>,
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

fn assert_equal(name: &str, mut noise: Noise, run: &Run) {
    for (i, draw) in run.draws.iter().enumerate() {
        let values = noise.normal(draw.shape);
        let first: Vec<u32> = bits(&values).into_iter().take(16).collect();
        assert_eq!(first, draw.first_bits, "{name}, draw {i}: first values");
        assert_eq!(sha256(&values), draw.sha256, "{name}, draw {i}");
    }
}

#[test]
fn every_golden_run_is_equal_bit_for_bit() {
    let golden = golden();
    assert!(golden.runs.len() >= 10 && golden.half.len() >= 10);
    for (name, run) in golden.runs {
        assert_equal(&name, Noise::new(run.seed), &run);
    }
    for (name, run) in golden.half {
        assert_equal(&name, Noise::of(NoiseKind::CpuF16, &[run.seed]), &run);
    }
    for (name, run) in golden.each {
        assert_equal(&name, Noise::of(NoiseKind::Cpu, &run.seeds), &run);
    }
}

#[test]
fn noise_of_cuda_is_that_of_its_generator() {
    for (name, run) in golden().cuda {
        let mut noise = Noise::of(NoiseKind::Cuda, &[run.seed]);
        for draw in run.draws {
            let mut values = vec![0.0; draw.count];
            noise.fill(&mut values);
            let last = values.len().saturating_sub(64);
            let pairs = values.iter().zip(&draw.first);
            for (found, expected) in pairs.chain(values[last..].iter().zip(&draw.last)) {
                assert!(
                    (found - expected).abs() <= 1e-5,
                    "{name}: {found} {expected}"
                );
            }
        }
    }
}

/// `torch.randn((3, 4), device="cuda")` after `torch.manual_seed(0)`, from the documentation of the web UI's `rng_philox.py`.
#[test]
fn noise_of_cuda_begins_as_published() {
    let published = [
        -0.924_662_6,
        -0.425_344_15,
        -2.643_845_7,
        0.145_183_9,
        -0.120_866_5,
        -0.579_725_6,
        -0.622_851_2,
        -0.328_387_1,
        -1.074_542_3,
        -0.363_144_1,
        -1.671_050_7,
        2.265_505,
    ];
    let mut values = [0.0_f32; 12];
    Noise::of(NoiseKind::Cuda, &[0]).fill(&mut values);
    for (found, expected) in values.iter().zip(published) {
        assert!((found - expected).abs() <= 1e-5, "{found} {expected}");
    }
}

#[test]
fn a_picture_of_several_seeds_is_that_of_its_own() {
    for kind in [NoiseKind::Cpu, NoiseKind::CpuF16, NoiseKind::Cuda] {
        let mut all = Noise::of(kind, &[3, 4, 5]);
        let mut own = Noise::of(kind, &[4]);
        for _ in 0..3 {
            let all = all.normal([3, 4, 8, 8]);
            let second = all.slice(ndarray::s![1..2, .., .., ..]).to_owned();
            assert_eq!(bits(&second), bits(&own.normal([1, 4, 8, 8])), "{kind}");
        }
    }
}

#[test]
fn every_kind_goes_on_from_its_positions() {
    for kind in [NoiseKind::Cpu, NoiseKind::CpuF16, NoiseKind::Cuda] {
        let mut unbroken = Noise::of(kind, &[3, 1 << 40]);
        unbroken.normal([2, 1, 1, 3]);
        let saved = serde_json::to_string(&unbroken.positions()).unwrap();
        let mut resumed = Noise::replay(&serde_json::from_str::<Vec<_>>(&saved).unwrap()).unwrap();
        assert_eq!(resumed, unbroken);
        let shape = [2, 4, 8, 8];
        assert_eq!(bits(&resumed.normal(shape)), bits(&unbroken.normal(shape)));
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
            let saved = serde_json::to_string(&unbroken.positions()).unwrap();
            let mut resumed =
                Noise::replay(&serde_json::from_str::<Vec<_>>(&saved).unwrap()).unwrap();
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
        kind: NoiseKind::Cpu,
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
        let message = Noise::replay(&[damaged]).unwrap_err().to_string();
        assert!(message.contains("seed"), "{message}");
    }
}
