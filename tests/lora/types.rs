//! Bases and LoRAs of every stored type: what is merged is what their stored values make in f64.

use std::sync::Arc;

use half::{bf16, f16};
use proptest::prelude::*;
use tempfile::TempDir;
use tronie::Result;
use tronie::lora::{LoraFile, change};
use tronie::weights::{ExpansionCache, Weights};

use crate::safetensors_file::{f32_bytes, well_formed};

const TENSOR: &str = "mid_block.resnets.0.conv1.weight";
const MODULE: &str = "lora_unet_middle_block_0_in_layers_2";
const OUTPUTS: usize = 6;
const INPUTS: usize = 5;
const KERNEL: usize = 9;
const RANK: usize = 3;
const COLUMNS: usize = INPUTS * KERNEL;
const SHAPE: [usize; 4] = [OUTPUTS, INPUTS, 3, 3];

/// Largest difference from f64, in units of the largest value: a few roundings of f32.
const ROUNDINGS: f64 = 5e-7;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stored {
    F32,
    F16,
    Bf16,
}

const TYPES: [Stored; 3] = [Stored::F32, Stored::F16, Stored::Bf16];

impl Stored {
    const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        let halves = |bits: fn(f32) -> u16| values.iter().flat_map(move |v| bits(*v).to_le_bytes());
        match self {
            Self::F32 => f32_bytes(values),
            Self::F16 => halves(|v| f16::from_f32(v).to_bits()).collect(),
            Self::Bf16 => halves(|v| bf16::from_f32(v).to_bits()).collect(),
        }
    }

    /// The stored values.
    fn rounded(self, values: &[f32]) -> Vec<f64> {
        let one = |v: &f32| match self {
            Self::F32 => f64::from(*v),
            Self::F16 => f16::from_f32(*v).to_f64(),
            Self::Bf16 => bf16::from_f32(*v).to_f64(),
        };
        values.iter().map(one).collect()
    }
}

/// Values of a base, a convolution, and a LoRA of it, before they are stored.
#[derive(Debug, Clone)]
struct Values {
    base: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    norms: Option<Vec<f32>>,
    alpha: f32,
}

fn values() -> impl Strategy<Value = Values> {
    let many = |count, range| proptest::collection::vec(range, count);
    (
        many(OUTPUTS * COLUMNS, -2.0_f32..2.0),
        many(OUTPUTS * RANK, -1.0_f32..1.0),
        many(RANK * COLUMNS, -1.0_f32..1.0),
        proptest::option::of(many(OUTPUTS, 0.5_f32..4.0)),
        prop_oneof![Just(1.0_f32), Just(1.5), Just(8.0)],
    )
        .prop_map(|(base, up, down, norms, alpha)| Values {
            base,
            up,
            down,
            norms,
            alpha,
        })
}

impl Values {
    fn base(&self, stored: Stored) -> Vec<u8> {
        let bytes = stored.bytes(&self.base);
        well_formed(&[(TENSOR, stored.name(), &SHAPE, &bytes)], 0)
    }

    fn lora(&self, stored: Stored) -> LoraFile {
        let name = |end: &str| format!("{MODULE}.{end}");
        let [up, down, alpha, scale] =
            ["lora_up.weight", "lora_down.weight", "alpha", "dora_scale"].map(name);
        let alpha_bytes = stored.bytes(&[self.alpha]);
        let (up_bytes, down_bytes) = (stored.bytes(&self.up), stored.bytes(&self.down));
        let norms = self.norms.as_ref().map(|norms| stored.bytes(norms));
        let kind = stored.name();
        let mut tensors: Vec<(&str, &str, &[usize], &[u8])> = vec![
            (&up, kind, &[OUTPUTS, RANK, 1, 1], &up_bytes),
            (&down, kind, &[RANK, INPUTS, 3, 3], &down_bytes),
            (&alpha, kind, &[], &alpha_bytes),
        ];
        if let Some(norms) = &norms {
            tensors.push((&scale, kind, &[OUTPUTS, 1, 1, 1], norms));
        }
        LoraFile::from_bytes("lora.safetensors", well_formed(&tensors, 0)).unwrap()
    }

    /// What the stored values make, all in f64.
    fn expected(&self, base: Stored, lora: Stored, strength: f64) -> Vec<f64> {
        let base = base.rounded(&self.base);
        let (up, down) = (lora.rounded(&self.up), lora.rounded(&self.down));
        let scale = lora.rounded(&[self.alpha])[0] / RANK as f64;
        let norms = self.norms.as_ref().map(|norms| lora.rounded(norms));
        let mut merged = Vec::new();
        for row in 0..OUTPUTS {
            let before = &base[row * COLUMNS..(row + 1) * COLUMNS];
            let product = |column: usize| {
                let terms = (0..RANK).map(|k| up[row * RANK + k] * down[k * COLUMNS + column]);
                terms.sum::<f64>()
            };
            let full: Vec<f64> = (0..COLUMNS)
                .map(|column| before[column] + scale * product(column))
                .collect();
            let length = full.iter().map(|v| v * v).sum::<f64>().sqrt();
            let stretch = norms.as_ref().map_or(1.0, |norms| norms[row] / length);
            let blend = |(b, f): (&f64, &f64)| b + strength * (f * stretch - b);
            merged.extend(before.iter().zip(&full).map(blend));
        }
        merged
    }
}

/// The base with the LoRA; expanded to a file first where there is a cache for it.
fn changed(
    base: &[u8],
    lora: &LoraFile,
    strength: f64,
    cache: Option<&ExpansionCache>,
) -> Result<Weights> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("unet.safetensors");
    std::fs::write(&path, base).unwrap();
    let mut weights = Weights::open(&[path])?;
    if let Some(cache) = cache {
        cache.expand(&mut weights, [TENSOR], &mut |_| Ok(()))?;
    }
    let fit = lora.fit(&[("unet".to_owned(), &weights)].into());
    assert_eq!(fit.unmatched, []);
    for matched in fit.matched {
        weights.change(TENSOR, change(Arc::new(matched), strength))?;
    }
    Ok(weights)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_merged_is_what_the_stored_values_make(values in values(), strength in -1.5_f64..1.5) {
        let folder = TempDir::new().unwrap();
        let cache = ExpansionCache::at(folder.path()).with_smallest(1);
        for base in TYPES {
            for lora in TYPES {
                let expected = values.expected(base, lora, strength);
                let largest = expected.iter().fold(0.0_f64, |l, v| l.max(v.abs())).max(2.0);
                let (bytes, file) = (values.base(base), values.lora(lora));
                let weights = changed(&bytes, &file, strength, None).unwrap();
                let wide = weights.tensor_f32(TENSOR, &SHAPE).unwrap();
                for (found, expected) in wide.as_slice().iter().zip(&expected) {
                    let apart = (f64::from(*found) - expected).abs();
                    prop_assert!(apart <= ROUNDINGS * largest, "{base:?} {lora:?}: {apart:e}");
                }
                // An expansion holds the same values, and a graph in f16 gets these rounded once.
                let expanded = changed(&bytes, &file, strength, Some(&cache)).unwrap();
                let expanded = expanded.tensor_f32(TENSOR, &SHAPE).unwrap();
                prop_assert!(expanded.as_slice() == wide.as_slice(), "{base:?} {lora:?}, expanded");
                let narrow = weights.tensor_f16(TENSOR, &SHAPE).unwrap();
                let rounded = wide.as_slice().iter().map(|v| f16::from_f32(*v));
                prop_assert!(narrow.as_slice().iter().copied().eq(rounded), "{base:?} {lora:?}, f16");
            }
        }
    }
}

#[test]
fn a_merged_value_beyond_f16_is_refused_where_a_graph_wants_f16() {
    let values = Values {
        base: vec![60_000.0; OUTPUTS * COLUMNS],
        up: vec![100.0; OUTPUTS * RANK],
        down: vec![20.0; RANK * COLUMNS],
        norms: None,
        alpha: 3.0,
    };
    for base in TYPES {
        let file = values.lora(Stored::F16);
        let weights = changed(&values.base(base), &file, 1.0, None).unwrap();
        let wide = weights.tensor_f32(TENSOR, &SHAPE).unwrap();
        assert!(wide.as_slice().iter().all(|v| *v > 65_504.0));
        let told = weights.tensor_f16(TENSOR, &SHAPE).unwrap_err().to_string();
        assert!(told.contains(TENSOR) && told.contains("65504"), "{told}");
        // What comes back under the limit is fine.
        let weights = changed(&values.base(base), &file, -1.0, None).unwrap();
        weights.tensor_f16(TENSOR, &SHAPE).unwrap();
    }
}

#[test]
fn what_is_changed_needs_no_expansion() {
    let values = Values {
        base: vec![1.5; OUTPUTS * COLUMNS],
        up: vec![0.5; OUTPUTS * RANK],
        down: vec![0.25; RANK * COLUMNS],
        norms: None,
        alpha: 3.0,
    };
    let file = values.lora(Stored::F16);
    let folder = TempDir::new().unwrap();
    let cache = ExpansionCache::at(folder.path()).with_smallest(1);
    let mut weights = changed(&values.base(Stored::F16), &file, 1.0, None).unwrap();
    cache
        .expand(&mut weights, [TENSOR], &mut |_| Ok(()))
        .unwrap();
    assert!(cache.entries().unwrap().is_empty());
    let merged = weights.tensor_f32(TENSOR, &SHAPE).unwrap();
    assert!(merged.as_slice().iter().all(|v| (v - 1.875).abs() < 1e-6));
    // Without the LoRA it is made.
    changed(&values.base(Stored::F16), &file, 0.0, Some(&cache)).unwrap();
    assert_eq!(cache.entries().unwrap().len(), 1);
}
