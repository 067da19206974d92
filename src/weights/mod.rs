//! Weights: the checkpoint's own `.safetensors` files, mapped into memory and read by tensor name.
//!
//! Nothing is loaded ahead: a tensor that is stored in the type a graph wants is used where it lies in the file. Others
//! are converted when they are asked for; f16 and bf16 to f32 also once, to a file that is mapped from then on
//! ([`ExpansionCache`]). What changes a weight (a `LoRA`) is a [`Change`] of single tensors on their way into a graph.
//!
//! Python twin: `safetensors.safe_open` with diffusers' `load_state_dict`.

pub(crate) mod content;
mod data;
mod expansion;
mod header;
mod mapping;
mod original;
mod substitute;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data::Unfit;
pub use data::{Element, WeightData};
use expansion::Expanded;
pub use expansion::{
    Entry, Expanding, ExpansionCache, OnExpanding, Origin, OriginState, readable_size,
};
use half::f16;
use mapping::Mapping;
pub use original::UnetNames;
pub use safetensors::Dtype;

use crate::error::{Error, Result, quoted};
use crate::model_file::ModelFile;

/// Tensors by name, out of one file or of several shards.
///
/// Clones are cheap, share the mappings, and are changed independently.
#[derive(Debug, Clone)]
pub struct Weights {
    files: Vec<Arc<Mapping>>,
    tensors: BTreeMap<String, Stored>,
    expanded: Option<Arc<Expanded>>,
    changes: BTreeMap<String, Vec<Arc<dyn Change>>>,
    metadata: BTreeMap<String, String>,
    replaced: BTreeMap<String, (Arc<Mapping>, Stored)>,
}

/// What becomes of a stored tensor on its way into a graph, such as a `LoRA`'s merge. It is worked out anew whenever the
/// tensor is asked for, so that it takes memory only where the result is held.
pub trait Change: fmt::Debug + Send + Sync {
    /// Changes a tensor's row-major `values` in place; `shape` is the tensor's.
    ///
    /// # Errors
    /// The change's own, such as [`Error::Weights`] of the file that it comes from.
    fn apply(&self, values: &mut [f32], shape: &[usize]) -> Result<()>;
}

/// Where a tensor lies: `range` is in bytes from the beginning of file number `file`.
#[derive(Debug, Clone)]
struct Stored {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A tensor as it is stored.
#[derive(Debug, Clone, Copy)]
pub struct WeightView<'a> {
    /// The stored type.
    pub dtype: Dtype,
    /// The dimensions; empty for a scalar.
    pub shape: &'a [usize],
    /// The values in row-major order, little-endian.
    pub bytes: &'a [u8],
}

/// Why a tensor cannot serve.
enum Fault<'a> {
    Absent,
    Shape(&'a [usize]),
    Type(Dtype),
    Overflow(f32),
}

impl Weights {
    /// Maps the files of one model component: one file, or all its shards. Built-in files are read where they are.
    ///
    /// # Errors
    /// [`Error::Missing`] if a file is not there; [`Error::Weights`] if one is not a well-formed safetensors file (the
    /// reason says what it is instead), or two of them hold a tensor of the same name.
    pub fn open<F: Clone + Into<ModelFile>>(files: &[F]) -> Result<Self> {
        let open = |file: &F| Mapping::open(&file.clone().into());
        Self::mapped(files.iter().map(open))
    }

    /// Reads one file's content that is in memory already; `path` is what errors call it.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self> {
        Self::mapped(std::iter::once(Ok(Mapping::of(path.into(), bytes))))
    }

    fn mapped(files: impl Iterator<Item = Result<Mapping>>) -> Result<Self> {
        let mut weights = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            expanded: None,
            changes: BTreeMap::new(),
            metadata: BTreeMap::new(),
            replaced: BTreeMap::new(),
        };
        for (file, map) in files.enumerate() {
            let map = Arc::new(map?);
            weights.files.push(Arc::clone(&map));
            let fault = |reason| Error::Weights {
                path: map.path.clone(),
                reason,
            };
            let header = header::read(map.bytes()).map_err(fault)?;
            for (key, text) in header.metadata {
                weights.metadata.entry(key).or_insert(text);
            }
            for entry in header.entries {
                match weights.tensors.entry(entry.name) {
                    Slot::Vacant(slot) => {
                        slot.insert(Stored {
                            file,
                            dtype: entry.dtype,
                            shape: entry.shape,
                            range: entry.range,
                        });
                    }
                    Slot::Occupied(slot) => {
                        let other = weights.files[slot.get().file].path.display();
                        return Err(fault(format!(
                            "tensor {} is also in {other}: list each shard of one model once, and no other file",
                            quoted(slot.key())
                        )));
                    }
                }
            }
        }
        Ok(weights)
    }

    /// The text under `__metadata__`, by key; of several shards, the first that has the key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor of any type, as it is stored: without its changes.
    ///
    /// # Errors
    /// [`Error::Weights`] if there is no tensor of this name; the reason lists similar ones.
    pub fn get(&self, name: &str) -> Result<WeightView<'_>> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| self.error(name, &[], &Fault::Absent))?;
        let bytes = &self.files[stored.file].bytes()[stored.range.clone()];
        Ok(WeightView {
            dtype: stored.dtype,
            shape: &stored.shape,
            bytes,
        })
    }

    /// A tensor's values as f32: in place if they are stored as f32 at an aligned place or have been expanded
    /// ([`ExpansionCache::expand`]), else widened (exact).
    ///
    /// # Errors
    /// [`Error::Weights`] if there is no tensor of this name, its shape is not `expected`, or it is stored as something
    /// else than f32, f16 or bf16.
    pub fn tensor_f32(&self, name: &str, expected: &[usize]) -> Result<WeightData> {
        let stored = self
            .fitting(name, expected)
            .map_err(|fault| self.error(name, expected, &fault))?;
        let data = self.unchanged_f32(name, stored)?;
        match self.changes.get(name) {
            None => Ok(data),
            Some(changes) => data.changed(changes),
        }
    }

    fn unchanged_f32(&self, name: &str, stored: &Stored) -> Result<WeightData> {
        let expanded = self
            .expanded
            .as_ref()
            .filter(|_| !self.replaced.contains_key(name));
        if let Some(data) = expanded.and_then(|e| e.tensor(name, stored)) {
            return Ok(data);
        }
        let (map, stored) = self.source(name, stored);
        WeightData::read(
            map,
            stored.range.clone(),
            stored.dtype,
            stored.shape.clone(),
        )
        .ok_or_else(|| self.error(name, &[], &Fault::Type(stored.dtype)))
    }

    /// A tensor's values as f16: in place if they are stored as f16 at an aligned place, else rounded to nearest.
    ///
    /// # Errors
    /// As [`Weights::tensor_f32`], and if a finite value is beyond f16's largest, 65504.
    pub fn tensor_f16(&self, name: &str, expected: &[usize]) -> Result<WeightData<f16>> {
        let stored = self
            .fitting(name, expected)
            .map_err(|fault| self.error(name, expected, &fault))?;
        let narrowed = if let Some(changes) = self.changes.get(name) {
            self.unchanged_f32(name, stored)?
                .changed(changes)?
                .narrowed()
        } else {
            let (map, stored) = self.source(name, stored);
            WeightData::read_half(
                map,
                stored.range.clone(),
                stored.dtype,
                stored.shape.clone(),
            )
        };
        narrowed.map_err(|unfit| {
            let fault = match unfit {
                Unfit::Type => Fault::Type(stored.dtype),
                Unfit::Overflow(value) => Fault::Overflow(value),
            };
            self.error(name, expected, &fault)
        })
    }

    /// Checks all tensors that a graph needs, before anything is built from them.
    ///
    /// # Errors
    /// [`Error::Weights`] for the first tensor that [`Weights::tensor_f32`] would refuse, with the number of all such.
    pub fn check<N: AsRef<str>, S: AsRef<[usize]>>(
        &self,
        required: impl IntoIterator<Item = (N, S)>,
    ) -> Result<()> {
        let (mut first, mut faults, mut total) = (None, 0_usize, 0_usize);
        for (name, shape) in required {
            total += 1;
            if let Err(fault) = self.fitting(name.as_ref(), shape.as_ref()) {
                faults += 1;
                if first.is_none() {
                    first = Some(self.error(name.as_ref(), shape.as_ref(), &fault));
                }
            }
        }
        match first {
            None => Ok(()),
            Some(Error::Weights { path, reason }) if faults > 1 => {
                let reason = format!(
                    "{reason} ({faults} of the {total} tensors that the graph needs do not fit)"
                );
                Err(Error::Weights { path, reason })
            }
            Some(error) => Err(error),
        }
    }

    /// Adds a change of a stored tensor, after those that it has. Clones made before are not affected.
    ///
    /// # Errors
    /// [`Error::Weights`] if there is no tensor of this name.
    pub fn change(&mut self, name: &str, change: Arc<dyn Change>) -> Result<()> {
        if !self.tensors.contains_key(name) {
            return Err(self.error(name, &[], &Fault::Absent));
        }
        self.changes
            .entry(name.to_owned())
            .or_default()
            .push(change);
        Ok(())
    }

    /// A tensor's shape, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// The stored tensor, if it can be read as f32 of this shape.
    fn fitting(&self, name: &str, expected: &[usize]) -> Result<&Stored, Fault<'_>> {
        let stored = self.tensors.get(name).ok_or(Fault::Absent)?;
        if stored.shape != expected {
            return Err(Fault::Shape(&stored.shape));
        }
        match stored.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(stored),
            other => Err(Fault::Type(other)),
        }
    }

    fn error(&self, name: &str, expected: &[usize], fault: &Fault<'_>) -> Error {
        let shown = quoted(name);
        let reason = match fault {
            Fault::Absent => format!("has no tensor {shown}; {}", self.hint(name)),
            Fault::Shape(found) => {
                format!("tensor {shown}: shape {expected:?} expected, {found:?} found")
            }
            Fault::Type(dtype) => format!(
                "tensor {shown} is stored as {dtype}, and only F32, F16 and BF16 can be used: use the checkpoint's \
                 f32, f16 or bf16 file"
            ),
            Fault::Overflow(value) => format!(
                "tensor {shown} holds {value}, and the largest number of f16, in which this graph computes, is 65504: \
                 run the model on another provider, such as cpu"
            ),
        };
        let file = self.tensors.get(name).map_or(0, |stored| stored.file);
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
            return format!(
                "{what}: use the component's own file of the model in the diffusers layout"
            );
        }
        let near = near_names(name, self.names());
        if near.is_empty() {
            return format!(
                "none of its {} tensors has a similar name: is it another model's file?",
                self.tensors.len()
            );
        }
        format!(
            "similar names in it: {}",
            near.into_iter().map(quoted).collect::<Vec<_>>().join(", ")
        )
    }

    /// The mapped files, in the order in which they were given.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|map| map.path.as_path())
    }
}

/// Parts of names that tell files which people often take for a component's weights.
const LAYOUTS: &[(&str, &str)] = &[
    (
        "model.diffusion_model.",
        "it is a whole model in one file, in the original layout",
    ),
    ("lora_unet_", "it holds a LoRA, not a model"),
    (".lora_A.", "it holds a LoRA, not a model"),
    ("lora_down.", "it holds a LoRA, not a model"),
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
