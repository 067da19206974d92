//! Overlays: the tensors that LoRAs make of a model's, merged into a safetensors file that is used where it lies.
//!
//! Tensors are called by component and name, `unet.down_blocks.…`, and are whole: base and changes together. The header
//! says of what base, by a key of its files' content, because on another one they would undo what makes it another.
//!
//! Twin: diffusers' `fuse_lora` with `save_pretrained`, which writes the unchanged tensors too.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::files::{Pending, write_pending};
use crate::progress::Observer;
use crate::request::LoraUse;
use crate::weights::{Dtype, WeightData, Weights};

/// Key of the metadata entry.
const KEY: &str = "tronie.overlay";
/// Version of what the entry says.
const FORMAT: u32 = 1;
/// Safetensors files have their data at a multiple of this.
const ALIGNMENT: usize = 8;

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

fn stored_name(component: &str, tensor: &str) -> String {
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

/// A tensor on its way into an overlay.
pub(super) struct Merged<'a> {
    pub(super) component: &'a str,
    pub(super) tensor: &'a str,
    pub(super) shape: &'a [usize],
    /// The component's weights with their changes.
    pub(super) weights: &'a Weights,
}

/// The type that an overlay's values are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayType {
    /// Four bytes; a processor uses them where they lie.
    F32,
    /// Two bytes, rounded to nearest.
    F16,
}

impl FromStr for OverlayType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(format!("`{name}` is not known; known: f32, f16")),
        }
    }
}

impl OverlayType {
    const fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    const fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
        }
    }
}

enum Values {
    F32(WeightData),
    F16(WeightData<f16>),
}

impl Values {
    fn of(merged: &Merged<'_>, kind: OverlayType) -> Result<Self> {
        let Merged {
            tensor,
            shape,
            weights,
            ..
        } = merged;
        Ok(match kind {
            OverlayType::F32 => Self::F32(weights.tensor_f32(tensor, shape)?),
            OverlayType::F16 => Self::F16(weights.tensor_f16(tensor, shape)?),
        })
    }

    /// Writes them, and says how many bytes they are.
    fn write(&self, to: &mut (dyn Write + Send)) -> io::Result<u64> {
        let native: &[u8] = match self {
            Self::F32(data) => bytemuck::cast_slice(data.as_slice()),
            Self::F16(data) => bytemuck::cast_slice(data.as_slice().reinterpret_cast()),
        };
        if cfg!(target_endian = "little") {
            to.write_all(native)?;
        } else {
            let width = if matches!(self, Self::F32(_)) { 4 } else { 2 };
            for value in native.chunks_exact(width) {
                let little: Vec<u8> = value.iter().rev().copied().collect();
                to.write_all(&little)?;
            }
        }
        Ok(native.len() as u64)
    }
}

/// Bytes of the values of an overlay.
pub(super) fn value_bytes(tensors: &[Merged<'_>], kind: OverlayType) -> u64 {
    let values = tensors.iter().map(|t| t.shape.iter().product::<usize>());
    values.map(|values| (values * kind.width()) as u64).sum()
}

/// Writes an overlay beside its target, tensor by tensor: the next one is merged while the last is written.
pub(super) fn write(
    target: &Path,
    about: &About,
    (tensors, kind): (&[Merged<'_>], OverlayType),
    on_written: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Pending> {
    let fail = |source| Error::Output {
        path: target.to_owned(),
        source,
    };
    let header = header(about, tensors, kind).map_err(fail)?;
    let mut stopped = None;
    let pending = write_pending(target, |to| {
        to.write_all(&header)?;
        let mut pour = || {
            let (mut ready, mut done) = (None::<Values>, 0);
            // One turn more than there are tensors, for the last one's writing.
            for merged in tensors.iter().map(Some).chain([None]) {
                let (written, next) = rayon::join(
                    || ready.as_ref().map_or(Ok(0), |values| values.write(to)),
                    || merged.map(|merged| Values::of(merged, kind)).transpose(),
                );
                done += written.map_err(fail)?;
                ready = next?;
                on_written(done)?;
            }
            Ok(())
        };
        pour().map_err(|error| {
            stopped = Some(error);
            io::Error::other("stopped")
        })
    });
    pending.map_err(|error| stopped.unwrap_or(error))
}

/// The length prefix and the header.
fn header(about: &About, tensors: &[Merged<'_>], kind: OverlayType) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.iter().map(|merged| {
        let start = end;
        end += value_bytes(std::slice::from_ref(merged), kind) as usize;
        let info = TensorInfo {
            dtype: kind.stored(),
            shape: merged.shape.to_vec(),
            data_offsets: (start, end),
        };
        (stored_name(merged.component, merged.tensor), info)
    });
    let about = HashMap::from([(KEY.to_owned(), serde_json::to_string(about)?)]);
    let metadata = Metadata::new(Some(about), infos.collect()).map_err(io::Error::other)?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}
