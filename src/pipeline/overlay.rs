//! Overlays: the tensors that LoRAs make of a model's, merged into a safetensors file that is used where it lies.
//!
//! Tensors are called by component and name, `unet.down_blocks.…`, and are whole: base and changes together. The header
//! says of what base, by a key of its files' content, because on another one they would undo what makes it another.
//!
//! Twin: diffusers' `fuse_lora` with `save_pretrained`, which writes the unchanged tensors too.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::progress::Observer;
use crate::request::LoraUse;
use crate::weights::{Dtype, Weights};

/// Key of the metadata entry.
pub(super) const KEY: &str = "tronie.overlay";
/// Version of what the entry says.
const FORMAT: u32 = 1;

/// What an overlay's header says of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct About {
    format: u32,
    /// The model's name when it was merged, for people.
    model: String,
    /// Keys of the content of the base's files, by component.
    bases: BTreeMap<String, String>,
    /// What was merged, for people.
    loras: Vec<LoraUse>,
}

impl About {
    pub(super) fn new(model: &str, bases: BTreeMap<String, String>, loras: Vec<LoraUse>) -> Self {
        Self {
            format: FORMAT,
            model: model.to_owned(),
            bases,
            loras,
        }
    }
}

/// An overlay, mapped.
#[derive(Debug)]
pub(super) struct Overlay {
    weights: Weights,
    about: About,
    tensors: BTreeMap<String, Vec<String>>,
}

impl Overlay {
    /// The overlay in a file, if it is one.
    pub(super) fn of(weights: Weights) -> Result<Option<Self>> {
        let path = weights.paths().next().map(Path::to_owned);
        let fail = |reason: String| Error::Weights {
            path: path.clone().unwrap_or_default(),
            reason,
        };
        let Some(text) = weights.metadata().get(KEY) else {
            return Ok(None);
        };
        let about: About = serde_json::from_str(text).map_err(|e| {
            fail(format!(
                "is an overlay, of which this tronie cannot read what it is: {e}"
            ))
        })?;
        if about.format != FORMAT {
            let found = about.format;
            return Err(fail(format!(
                "is an overlay of format {found}; this tronie reads format {FORMAT}"
            )));
        }
        let mut tensors = BTreeMap::<String, Vec<String>>::new();
        for name in weights.names() {
            let split = name.split_once('.');
            let known = split.filter(|(component, _)| about.bases.contains_key(*component));
            let Some((component, tensor)) = known else {
                return Err(fail(format!("tensor `{name}` belongs to no component")));
            };
            let of_component = tensors.entry(component.to_owned()).or_default();
            of_component.push(tensor.to_owned());
        }
        Ok(Some(Self {
            weights,
            about,
            tensors,
        }))
    }

    pub(super) fn path(&self) -> String {
        let path = self.weights.paths().next();
        path.map_or_else(String::new, |path| path.display().to_string())
    }

    pub(super) fn metadata(&self) -> &BTreeMap<String, String> {
        self.weights.metadata()
    }

    /// The tensors that it holds, by component.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Vec<String>> {
        &self.tensors
    }

    /// Has a component's weights give a tensor from here.
    pub(super) fn replace(
        &self,
        component: &str,
        tensor: &str,
        weights: &mut Weights,
    ) -> Result<()> {
        weights.substitute(tensor, &self.weights, &stored_name(component, tensor))
    }

    /// Whether a tensor is f32, so that a graph of the processor uses it where it lies.
    pub(super) fn is_wide(&self, component: &str, tensor: &str) -> bool {
        let view = self.weights.get(&stored_name(component, tensor));
        view.is_ok_and(|view| view.dtype == Dtype::F32)
    }
}

/// What a component's tensor is called in an overlay.
pub(super) fn stored_name(component: &str, tensor: &str) -> String {
    format!("{component}.{tensor}")
}

impl Pipeline {
    /// An overlay is used as it is, and on its own base.
    pub(super) fn check_overlay(
        &self,
        overlay: &Overlay,
        lora: &LoraUse,
        (name, targets): (&str, &BTreeMap<String, Weights>),
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let scales = [Some(lora.scale), lora.te_scale];
        if scales
            .into_iter()
            .flatten()
            .any(|scale| scale.to_bits() != 1.0_f64.to_bits())
        {
            let reason = format!(
                "`{}` is an overlay, whose LoRAs are merged with their scales: its own is 1, or 0 to leave it out",
                lora.lora
            );
            return Err(Error::request("lora", reason));
        }
        for component in overlay.tensors.keys() {
            let key = match targets.get(component) {
                Some(weights) => Some(self.content_key(weights, (name, component), observer)?),
                None => None,
            };
            if key.as_ref() != overlay.about.bases.get(component) {
                let path = overlay.path().into();
                let reason = format!(
                    "is an overlay of another {component} than that of {name}; it was merged for a model called {}: use \
                     it with that one, or merge the LoRAs again",
                    overlay.about.model
                );
                return Err(Error::Weights { path, reason });
            }
        }
        Ok(())
    }
}
