//! Weights from well-formed files: exact values, in place where they can be, and clear words where a graph does not fit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::safetensors_file::{f32_bytes, raw, well_formed};
use half::f16;
use tempfile::TempDir;
use tronie::Error;
use tronie::model_file::ModelFile;
use tronie::weights::{Change, Dtype, WeightData, Weights};

fn saved(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn u16_bytes(values: impl IntoIterator<Item = u16>) -> Vec<u8> {
    values.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn opened(bytes: &[u8]) -> Result<Weights, Error> {
    let folder = TempDir::new().unwrap();
    Weights::open(&[saved(&folder, "model.safetensors", bytes)])
}

fn reason(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result {
        Err(Error::Weights { reason, .. }) => reason,
        other => panic!("an error about weights was expected, not {other:?}"),
    }
}

#[test]
fn paths_that_are_no_files_are_refused() {
    let folder = TempDir::new().unwrap();
    assert!(reason(Weights::open(&[folder.path().to_owned()])).contains("is a directory"));
    let absent = folder.path().join("absent.safetensors");
    match Weights::open(std::slice::from_ref(&absent)) {
        Err(Error::Missing { path, remedy }) => {
            assert_eq!(path, absent);
            assert!(remedy.contains("catalogue"));
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_dangling_ones_and_devices_are_refused() {
    let folder = TempDir::new().unwrap();
    let blob = saved(
        &folder,
        "blob",
        &well_formed(&[("t", "F32", &[1], &f32_bytes(&[7.0]))], 0),
    );
    let link = folder.path().join("link.safetensors");
    std::os::unix::fs::symlink("blob", &link).unwrap();
    assert_eq!(
        Weights::open(std::slice::from_ref(&link))
            .unwrap()
            .tensor_f32("t", &[1])
            .unwrap()
            .as_slice(),
        [7.0]
    );
    std::fs::remove_file(blob).unwrap();
    match Weights::open(&[link]) {
        Err(Error::Missing { remedy, .. }) => {
            assert!(remedy.contains("a link to blob"), "{remedy}");
        }
        other => panic!("{other:?}"),
    }
    assert!(reason(Weights::open(&[ModelFile::from("/dev/null")])).contains("not a regular file"));
}

#[test]
fn aligned_f32_is_used_where_it_lies_in_the_file_and_keeps_it_mapped() {
    let folder = TempDir::new().unwrap();
    let values: Vec<f32> = (0..5000_u16).map(|i| f32::from(i) * 0.25).collect();
    let path = saved(
        &folder,
        "m.safetensors",
        &well_formed(&[("t", "F32", &[50, 100], &f32_bytes(&values))], 0),
    );
    let weights = Weights::open(std::slice::from_ref(&path)).unwrap();
    let view = weights.get("t").unwrap();
    assert_eq!(
        (view.dtype, view.shape, view.bytes.len()),
        (Dtype::F32, &[50_usize, 100][..], 20_000)
    );
    let data = weights.tensor_f32("t", &[50, 100]).unwrap();
    assert!(data.is_mapped());
    assert_eq!(data.as_ptr().cast(), view.bytes.as_ptr());
    assert_lies_in_a_mapping_of(&path, data.as_ptr() as usize);
    drop(weights);
    std::fs::remove_file(path).unwrap();
    assert_eq!(data.as_slice(), values);
    assert_eq!(data.clone().as_ptr(), data.as_ptr());
    assert_eq!(data.shape(), [50, 100]);
}

#[cfg(target_os = "linux")]
fn assert_lies_in_a_mapping_of(path: &Path, address: usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let found = maps
        .lines()
        .filter(|line| line.ends_with(path.to_str().unwrap()))
        .any(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let hex = |text| usize::from_str_radix(text, 16).unwrap();
            (hex(start)..hex(end)).contains(&address)
        });
    assert!(
        found,
        "{address:x} lies in no mapping of {}",
        path.display()
    );
}

#[cfg(not(target_os = "linux"))]
fn assert_lies_in_a_mapping_of(_: &Path, _: usize) {}

#[test]
fn misaligned_f32_is_copied() {
    let values: Vec<f32> = (0..100_000_u32)
        .map(|i| f32::from_bits(i * 40_503))
        .collect();
    for misalign in [1, 2, 3, 5, 6, 7] {
        let weights = opened(&well_formed(
            &[("t", "F32", &[100_000], &f32_bytes(&values))],
            misalign,
        ))
        .unwrap();
        let data = weights.tensor_f32("t", &[100_000]).unwrap();
        assert!(!data.is_mapped());
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(data.as_slice()), bits(&values));
    }
}

/// IEEE 754 binary16 by its definition.
fn f16_value(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2_f64.powi(exponent - 15),
    }
}

#[allow(clippy::float_cmp)] // Exactness is what is tested.
fn assert_same(found: f32, expected: f64, pattern: usize) {
    let same =
        f64::from(found) == expected && found.is_sign_negative() == expected.is_sign_negative();
    assert!(
        same || (found.is_nan() && expected.is_nan()),
        "{pattern:x}: {found} is not {expected}"
    );
}

#[test]
fn every_f16_and_bf16_widens_exactly() {
    // All patterns and three more, so that no block comes out even.
    let patterns = || (0..=u16::MAX).chain([0x3c00, 0x0001, 0xfc00]);
    let (bytes, shape) = (u16_bytes(patterns()), [65_539]);
    for misalign in [0, 1] {
        let file = well_formed(
            &[("h", "F16", &shape, &bytes), ("b", "BF16", &shape, &bytes)],
            misalign,
        );
        let weights = opened(&file).unwrap();
        let (half, brain) = (
            weights.tensor_f32("h", &shape).unwrap(),
            weights.tensor_f32("b", &shape).unwrap(),
        );
        assert!(!half.is_mapped());
        for (i, bits) in patterns().enumerate() {
            assert_same(half.as_slice()[i], f16_value(bits), i);
            assert_same(
                brain.as_slice()[i],
                f64::from(f32::from_bits(u32::from(bits) << 16)),
                i,
            );
        }
        assert_eq!(weights.get("b").unwrap().bytes, bytes);
    }
}

#[test]
fn scalars_and_tensors_without_elements_are_tensors() {
    let file = well_formed(
        &[
            ("none", "F32", &[0, 3], &[]),
            ("s", "F32", &[], &f32_bytes(&[2.5])),
            ("end", "BF16", &[0], &[]),
        ],
        0,
    );
    let weights = opened(&file).unwrap();
    assert_eq!(weights.tensor_f32("s", &[]).unwrap().as_slice(), [2.5]);
    assert_eq!(
        weights.tensor_f32("none", &[0, 3]).unwrap().as_slice(),
        [0.0_f32; 0]
    );
    assert_eq!(weights.tensor_f32("end", &[0]).unwrap().shape(), [0]);
    assert_eq!(weights.names().collect::<Vec<_>>(), ["end", "none", "s"]);
    assert_eq!(opened(&raw("{}", b"")).unwrap().names().count(), 0);
}

#[test]
fn shards_are_one_model_and_no_tensor_may_be_in_two() {
    let folder = TempDir::new().unwrap();
    let first = saved(
        &folder,
        "1.safetensors",
        &well_formed(&[("a", "F32", &[1], &f32_bytes(&[1.0]))], 0),
    );
    let second = saved(
        &folder,
        "2.safetensors",
        &well_formed(&[("b", "F16", &[1], &u16_bytes([0x4000]))], 0),
    );
    let weights = Weights::open(&[first.clone(), second.clone()]).unwrap();
    assert_eq!(weights.tensor_f32("a", &[1]).unwrap().as_slice(), [1.0]);
    assert_eq!(weights.tensor_f32("b", &[1]).unwrap().as_slice(), [2.0]);
    assert_eq!(
        weights.paths().collect::<Vec<_>>(),
        [first.as_path(), second.as_path()]
    );
    let found = Weights::open(&[first.clone(), second, first.clone()])
        .unwrap_err()
        .to_string();
    assert!(
        found.contains(&format!("tensor `a` is also in {}", first.display())),
        "{found}"
    );
}

#[test]
fn other_types_are_accepted_until_they_are_asked_for() {
    let weights = opened(&well_formed(
        &[
            ("ids", "I64", &[1], &[0; 8]),
            ("w", "F32", &[1], &f32_bytes(&[1.0])),
            ("q", "F8_E4M3", &[4], &[0; 4]),
        ],
        0,
    ))
    .unwrap();
    weights.tensor_f32("w", &[1]).unwrap();
    assert_eq!(weights.get("ids").unwrap().dtype, Dtype::I64);
    for (name, shape, dtype) in [("ids", 1, "I64"), ("q", 4, "F8_E4M3")] {
        let found = reason(weights.tensor_f32(name, &[shape]));
        assert!(
            found.contains(&format!(
                "tensor `{name}` is stored as {dtype}, and only F32, F16 and BF16"
            )),
            "{found}"
        );
    }
}

#[test]
fn a_wrong_shape_or_name_is_said_with_what_would_be_right() {
    let zero = f32_bytes(&[0.0; 6]);
    let names = [
        "down_blocks.0.attn1.to_q.weight",
        "down_blocks.0.attn1.to_k.weight",
        "conv_in.bias",
    ];
    let file = well_formed(
        &names.map(|name| (name, "F32", &[2_usize, 3][..], &zero[..])),
        0,
    );
    let weights = opened(&file).unwrap();
    assert_eq!(
        reason(weights.tensor_f32("conv_in.bias", &[3, 2])),
        "tensor `conv_in.bias`: shape [3, 2] expected, [2, 3] found"
    );
    let found = reason(weights.get("unet.down_blocks.0.attn1.to_q.weight"));
    assert!(
        found.contains("similar names in it: `down_blocks.0.attn1.to_q.weight`"),
        "{found}"
    );
    assert!(!found.contains("conv_in"), "{found}");
    assert!(reason(weights.get("zzz")).contains("none of its 3 tensors has a similar name"));
    for (name, what) in [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "a whole model in one file",
        ),
        ("lora_unet_mid_block.lora_down.weight", "holds a LoRA"),
    ] {
        let other = opened(&well_formed(&[(name, "F32", &[2, 3], &zero)], 0)).unwrap();
        assert!(reason(other.get("conv_in.weight")).contains(what));
    }
}

#[test]
fn check_names_the_first_misfit_and_counts_all() {
    let zero = f32_bytes(&[0.0; 6]);
    let file = well_formed(
        &[
            ("a", "F32", &[6], &zero),
            ("b", "F32", &[2, 3], &zero),
            ("c", "I32", &[6], &zero),
        ],
        0,
    );
    let weights = opened(&file).unwrap();
    weights.check([("a", vec![6]), ("b", vec![2, 3])]).unwrap();
    weights.check::<&str, Vec<usize>>([]).unwrap();
    let found = reason(weights.check([
        ("a", vec![6]),
        ("b", vec![3, 2]),
        ("c", vec![6]),
        ("d", vec![]),
    ]));
    assert!(
        found.starts_with("tensor `b`: shape [3, 2] expected, [2, 3] found"),
        "{found}"
    );
    assert!(found.contains("3 of the 4 tensors"), "{found}");
    assert!(!reason(weights.check([("b", [6])])).contains("of the"));
}

/// Multiplies, and refuses to where it is told to.
#[derive(Debug)]
struct Times(f32);

impl Change for Times {
    fn apply(&self, values: &mut [f32], shape: &[usize]) -> Result<(), Error> {
        if self.0.is_nan() {
            let (path, reason) = ("lora".into(), format!("{shape:?}"));
            return Err(Error::Weights { path, reason });
        }
        for value in values {
            *value *= self.0;
        }
        Ok(())
    }
}

#[test]
fn changes_of_a_tensor_are_made_in_order_and_in_that_clone_only() {
    let file = well_formed(&[("a", "F16", &[2], &u16_bytes([0x3c00; 2]))], 0);
    let original = opened(&file).unwrap();
    let mut changed = original.clone();
    changed.change("a", Arc::new(Times(3.0))).unwrap();
    changed.change("a", Arc::new(Times(0.5))).unwrap();
    let values = |weights: &Weights| weights.tensor_f32("a", &[2]).unwrap().as_slice().to_vec();
    assert_eq!(values(&changed), [1.5; 2]);
    assert_eq!(
        changed.tensor_f16("a", &[2]).unwrap().as_slice(),
        [f16::from_f32(1.5); 2]
    );
    assert_eq!(values(&original), [1.0; 2]);
    assert_eq!(changed.get("a").unwrap().dtype, Dtype::F16);
    changed.change("a", Arc::new(Times(f32::NAN))).unwrap();
    assert_eq!(reason(changed.tensor_f32("a", &[2])), "[2]");
    assert!(reason(changed.change("z", Arc::new(Times(1.0)))).contains("has no tensor `z`"));
}

#[test]
fn a_hundred_thousand_tensors_open() {
    let names: Vec<String> = (0..100_000)
        .map(|i| format!("block.{i}.a_rather_long_name.weight"))
        .collect();
    let tensors: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), "U8", &[1_usize][..], &[0_u8][..]))
        .collect();
    assert_eq!(
        opened(&well_formed(&tensors, 0)).unwrap().names().count(),
        100_000
    );
}

#[test]
fn weights_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Weights>();
    shared::<WeightData>();
}
