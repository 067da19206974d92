//! What is said of a tensor that cannot serve.
//!
//! Python twin: the messages of `load_state_dict`.

use std::path::PathBuf;

use safetensors::Dtype;

use super::Weights;
use crate::error::{Error, quoted};

/// Why a tensor cannot serve.
pub(super) enum Fault<'a> {
    Absent,
    Shape(&'a [usize]),
    Type(Dtype),
    Transposed,
    Overflow(f32),
}

impl Weights {
    pub(super) fn error(&self, name: &str, expected: &[usize], fault: &Fault<'_>) -> Error {
        let stored = self.tensors.get(name);
        let original = stored.and_then(|stored| stored.original.as_deref());
        let shown = match original {
            Some(original) => format!("{} ({} in the file)", quoted(name), quoted(original)),
            None => quoted(name),
        };
        let reason = match fault {
            Fault::Absent => format!("has no tensor {shown}; {}", self.hint(name)),
            Fault::Shape(found) => {
                format!("tensor {shown}: shape {expected:?} expected, {found:?} found")
            }
            Fault::Type(dtype) => format!(
                "tensor {shown} is stored as {dtype}, and only F32, F16 and BF16 can be used: use the checkpoint's \
                 f32, f16 or bf16 file"
            ),
            Fault::Transposed => format!(
                "tensor {shown} is stored the other way round than {expected:?}: read its values, not its bytes"
            ),
            Fault::Overflow(value) => format!(
                "tensor {shown} holds {value}, and the largest number of f16, in which this graph computes, is 65504: \
                 run the model on another provider, such as cpu"
            ),
        };
        let file = stored.map_or(0, |stored| stored.file);
        let path = self
            .files
            .get(file)
            .map_or_else(PathBuf::new, |map| map.path.clone());
        Error::Weights { path, reason }
    }

    /// What to say when a tensor is not there.
    fn hint(&self, name: &str) -> String {
        if let Some(&(_, what)) = LAYOUTS
            .iter()
            .find(|(mark, _)| self.names().any(|name| name.contains(mark)))
        {
            return what.to_owned();
        }
        let near = near_names(name, self.names());
        let shown = |near: &str| match &self.tensors[near].original {
            Some(original) => format!("{} ({} in the file)", quoted(near), quoted(original)),
            None => quoted(near),
        };
        if near.is_empty() {
            return format!(
                "none of its {} tensors has a similar name: is it another model's file?",
                self.tensors.len()
            );
        }
        format!(
            "similar names in it: {}",
            near.into_iter().map(shown).collect::<Vec<_>>().join(", ")
        )
    }
}

/// Parts of names that tell files which people often take for a component's weights.
const LAYOUTS: &[(&str, &str)] = &[
    (
        "model.diffusion_model.",
        "it is a whole model in one file, in the original layout: run it with --model FILE, or name it under \
         `checkpoint` in the catalogue",
    ),
    (
        "lora_unet_",
        "it holds a LoRA, not a model: use the component's own file of the model in the diffusers layout",
    ),
    (
        ".lora_A.",
        "it holds a LoRA, not a model: use the component's own file of the model in the diffusers layout",
    ),
    (
        "lora_down.",
        "it holds a LoRA, not a model: use the component's own file of the model in the diffusers layout",
    ),
];

/// Up to three names that share most of their beginning and end with `name`, best first.
fn near_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let equal = |a: &mut dyn Iterator<Item = u8>, b: &mut dyn Iterator<Item = u8>| {
        a.zip(b).take_while(|(a, b)| a == b).count()
    };
    let mut scored: Vec<_> = names
        .map(|other| {
            let start = equal(&mut name.bytes(), &mut other.bytes());
            let end = equal(&mut name.bytes().rev(), &mut other.bytes().rev());
            let longer = name.len().max(other.len());
            (longer.saturating_sub((start + end).min(longer)), other)
        })
        .filter(|&(apart, _)| apart <= name.len() / 2)
        .collect();
    scored.sort_unstable();
    scored.into_iter().take(3).map(|(_, other)| other).collect()
}
