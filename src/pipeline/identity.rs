//! Identities of faces in files: what `ArcFace` makes of a face, as users of insightface keep it.
//!
//! Python twin: `normed_embedding` of insightface's `Face`, saved with `safetensors.numpy.save_file` or `numpy.save`.
//! Such a `.npy` file is one vector, which a header of one line describes; a library would read far more than that.

use std::path::Path;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::error::{Error, Result, quoted};
use crate::files::read_input;
use crate::plan::names;
use crate::tensor::all_finite;

/// An identity is 2 KB.
const MAX_BYTES: u64 = 1 << 20;
/// How far from 1 the length may be: that of a vector rounded to bf16 is off by less.
const LENGTH_TOLERANCE: f64 = 1e-3;
/// How to make such a file.
const SAVE: &str = "save insightface's `face.normed_embedding` with numpy.save(\"id.npy\", …)";

/// Reads the identity `[1, width]` of one face, whose length is 1; it is taken as it is.
///
/// # Errors
/// [`Error::Input`] when the file is a picture or another kind of file, is damaged, or holds something other than one
/// vector of `width` finite numbers and of length 1.
pub(super) fn read_identity(path: &Path, width: usize) -> Result<ArrayD<f32>> {
    let fail = |reason: String| Error::Input {
        path: path.to_owned(),
        reason,
    };
    let kind = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    let values = match kind.as_deref() {
        Some("safetensors") => from_safetensors(&read_input(path, MAX_BYTES)?),
        Some("npy") => from_npy(&read_input(path, MAX_BYTES)?),
        _ => Err(format!(
            "is no file of an identity (.safetensors, .npy), and identities cannot be found in pictures yet; {SAVE}"
        )),
    };
    let values = values.map_err(fail)?;
    check(&values, width).map_err(fail)?;
    ArrayD::from_shape_vec(IxDyn(&[1, width]), values).map_err(|e| fail(e.to_string()))
}

fn check(values: &[f32], width: usize) -> Result<(), String> {
    let count = values.len();
    if count != width {
        let several = count != 0 && width != 0 && count.is_multiple_of(width);
        let remedy = if several {
            "save every identity in a file of its own"
        } else {
            SAVE
        };
        return Err(format!(
            "has {count} numbers, but the adapter reads identities of {width}; {remedy}"
        ));
    }
    if !all_finite(values) {
        return Err(format!("has numbers that are not finite; {SAVE}"));
    }
    let squares = values.iter().map(|v| f64::from(*v).powi(2));
    let length = squares.sum::<f64>().sqrt();
    if (length - 1.0).abs() > LENGTH_TOLERANCE {
        return Err(format!(
            "is of length {length:.4}, not 1: insightface's `embedding` perhaps; {SAVE}, or divide it by its length"
        ));
    }
    Ok(())
}

fn from_safetensors(bytes: &[u8]) -> Result<Vec<f32>, String> {
    let whole = |e| format!("is not a whole safetensors file: {e}");
    let file = SafeTensors::deserialize(bytes).map_err(whole)?;
    let mut tensors = file.tensors();
    if tensors.iter().any(|(name, _)| name == names::ID_EMBEDS) {
        tensors.retain(|(name, _)| name == names::ID_EMBEDS);
    }
    if tensors.iter().any(|(name, _)| name == names::HIDDEN_STATES) {
        return Err(format!(
            "holds what an image encoder saw in a picture, not an identity; {SAVE}"
        ));
    }
    let [(name, view)] = &tensors[..] else {
        return Err(format!(
            "has {} tensors and none is called `{}`; {SAVE}",
            tensors.len(),
            names::ID_EMBEDS
        ));
    };
    let kind = match view.dtype() {
        Dtype::F16 => Kind::F16,
        Dtype::BF16 => Kind::Bf16,
        Dtype::F32 => Kind::F32,
        Dtype::F64 => Kind::F64,
        other => {
            return Err(format!("{} is {other:?}; save it as F32", quoted(name)));
        }
    };
    Ok(kind.values(view.data()))
}

/// Types of numbers, in little-endian order.
#[derive(Clone, Copy)]
enum Kind {
    F16,
    Bf16,
    F32,
    F64,
}

impl Kind {
    fn values(self, bytes: &[u8]) -> Vec<f32> {
        fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|b| value(*b)).collect()
        }
        match self {
            Self::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F32 => each(bytes, f32::from_le_bytes),
            Self::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        }
    }

    const fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A vector's order is its only one, so that the header matters for the type of its numbers alone.
fn from_npy(bytes: &[u8]) -> Result<Vec<f32>, String> {
    let cut = || format!("is not a whole file of numpy.save; {SAVE}");
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or_else(cut)?;
    let (length, rest) = match rest {
        [1, _, a, b, rest @ ..] => (u32::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]), rest),
        _ => return Err(cut()),
    };
    let (header, data) = rest.split_at_checked(length as usize).ok_or_else(cut)?;
    let header = String::from_utf8_lossy(header);
    let entry = |key: &str| {
        let (_, value) = header.split_once(&format!("'{key}':"))?;
        Some(value.trim_start())
    };
    let descr = entry("descr").and_then(|d| d.strip_prefix('\'')?.split('\'').next());
    let kind = match descr.ok_or_else(cut)? {
        "<f2" => Kind::F16,
        "<f4" => Kind::F32,
        "<f8" => Kind::F64,
        other => {
            return Err(format!(
                "holds numbers of numpy's type {}; save them as float32",
                quoted(other)
            ));
        }
    };
    let shape = entry("shape").and_then(|s| s.strip_prefix('(')?.split(')').next());
    let sizes = shape.ok_or_else(cut)?.split(',').map(str::trim);
    let sizes = sizes.filter(|size| !size.is_empty());
    let count = sizes
        .map(str::parse)
        .try_fold(1_usize, |product, size| product.checked_mul(size.ok()?));
    if count.and_then(|n| n.checked_mul(kind.bytes())) != Some(data.len()) {
        return Err(cut());
    }
    Ok(kind.values(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `numpy.save` lays it out.
    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    fn read(name: &str, bytes: &[u8]) -> Result<ArrayD<f32>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read_identity(&path, 4)
    }

    fn reason(name: &str, bytes: &[u8]) -> String {
        read(name, bytes).unwrap_err().to_string()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn safetensors(tensors: &[(&str, Dtype, &[u8])]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, data)| {
            let count = data.len() * 8 / dtype.bitsize();
            let view = safetensors::tensor::TensorView::new(*dtype, vec![1, count], data);
            (*name, view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    const FACE: [f32; 4] = [0.5, -0.5, 0.5, -0.5];

    #[test]
    fn every_type_and_container_gives_the_same_identity() {
        let half: Vec<u8> = FACE
            .iter()
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect();
        let brain: Vec<u8> = FACE
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect();
        let double: Vec<u8> = FACE
            .iter()
            .flat_map(|v| f64::from(*v).to_le_bytes())
            .collect();
        let single = f32s(&FACE);
        let mut second = npy("<f4", "(1, 4)", &single);
        second[6] = 2;
        second.splice(10..10, [0, 0]);
        for (name, bytes) in [
            ("a.npy", npy("<f4", "(4,)", &single)),
            ("a.npy", npy("<f2", "(1, 4)", &half)),
            ("a.npy", npy("<f8", "(1, 1, 4)", &double)),
            ("a.npy", second),
            ("a.safetensors", safetensors(&[("x", Dtype::F32, &single)])),
            ("a.safetensors", safetensors(&[("x", Dtype::F16, &half)])),
            ("a.SAFETENSORS", safetensors(&[("x", Dtype::BF16, &brain)])),
            (
                "a.safetensors",
                safetensors(&[("a", Dtype::U8, &[1]), ("id_embeds", Dtype::F64, &double)]),
            ),
        ] {
            let found = read(name, &bytes).unwrap();
            assert_eq!(found.shape(), [1, 4]);
            assert_eq!(found.as_slice().unwrap(), FACE, "{name}");
        }
    }

    fn assert_says(said: &str, parts: &[&str]) {
        for part in parts {
            assert!(said.contains(part), "no {part:?} in: {said}");
        }
    }

    #[test]
    fn what_is_no_file_of_an_identity_is_refused_with_the_way_to_one() {
        let single = f32s(&FACE);
        for (name, bytes, parts) in [
            (
                "a.png",
                vec![1],
                &[
                    "identities cannot be found in pictures yet",
                    "normed_embedding",
                ][..],
            ),
            (
                "a",
                vec![1],
                &["no file of an identity (.safetensors, .npy)"],
            ),
            ("a.npy", Vec::new(), &["not a whole file of numpy.save"]),
            (
                "a.npy",
                npy("<f4", "(4,)", &single[1..]),
                &["not a whole file"],
            ),
            (
                "a.npy",
                npy("<f4", "(99999999999999999999,)", &single),
                &["not a whole file"],
            ),
            ("a.npy", npy(">f4", "(4,)", &single), &["`>f4`", "float32"]),
            ("a.npy", npy("|O", "(4,)", &single), &["`|O`"]),
            (
                "a.safetensors",
                vec![8, 0, 0],
                &["not a whole safetensors file"],
            ),
            (
                "a.safetensors",
                safetensors(&[("x", Dtype::I64, &[0; 8])]),
                &["`x` is I64"],
            ),
            (
                "a.safetensors",
                safetensors(&[
                    ("hidden_states", Dtype::F32, &single),
                    ("image_embeds", Dtype::F32, &single),
                ]),
                &["saw in a picture, not an identity"],
            ),
            (
                "a.safetensors",
                safetensors(&[("x", Dtype::F32, &single), ("y", Dtype::F32, &single)]),
                &["has 2 tensors", "`id_embeds`"],
            ),
        ] {
            assert_says(&reason(name, &bytes), parts);
        }
    }

    #[test]
    fn numbers_that_are_no_identity_are_refused() {
        for (values, parts) in [
            (
                vec![1.0],
                &["has 1 numbers", "identities of 4", "normed_embedding"][..],
            ),
            (vec![0.5; 8], &["has 8 numbers", "a file of its own"]),
            (vec![0.5, 0.5, 0.5, f32::NAN], &["not finite"]),
            (vec![0.0; 4], &["length 0.0000, not 1"]),
            (
                vec![10.0; 4],
                &["length 20.0000, not 1", "`embedding`", "divide"],
            ),
            (vec![0.5, 0.5, 0.5, 0.503], &["length 1.0015"]),
        ] {
            let file = npy("<f4", &format!("({},)", values.len()), &f32s(&values));
            assert_says(&reason("a.npy", &file), parts);
        }
    }
}
