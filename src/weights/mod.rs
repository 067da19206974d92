//! Weights: the checkpoint's own `.safetensors` files, mapped into memory and read by tensor name.
//!
//! Nothing is loaded ahead: a tensor that is stored in the type a graph wants is used where it lies in the file. Others
//! are converted when they are asked for; f16 and bf16 to f32 also once, to a file that is mapped from then on
//! ([`ExpansionCache`]). What changes a weight (a `LoRA`) is a [`Change`] of single tensors on their way into a graph.
//!
//! Python twin: `safetensors.safe_open` with diffusers' `load_state_dict`.

mod changed;
pub(crate) mod content;
mod data;
mod expansion;
mod fault;
mod header;
mod mapping;
pub(crate) mod original;
mod substitute;
mod view;

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
use fault::Fault;
use half::f16;
use mapping::Mapping;
pub use original::UnetNames;
pub use safetensors::Dtype;

use crate::error::{Error, Result, quoted};
use crate::model_file::ModelFile;

/// Tensors by name, out of one file or of several shards, or what a component has in a file of a whole model
/// ([`Weights::components`]).
///
/// Clones are cheap, share the mappings, and are changed independently.
#[derive(Debug, Clone)]
pub struct Weights {
    files: Vec<Arc<Mapping>>,
    tensors: BTreeMap<String, Stored>,
    /// All tensors of the files that any component has, where `tensors` are views of them.
    whole: Option<Arc<BTreeMap<String, Stored>>>,
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
    /// Its name in the file, where that is another.
    original: Option<Arc<str>>,
    /// Whether a matrix of `shape` is stored the other way round, `[columns, rows]`.
    is_transposed: bool,
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
            whole: None,
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
                            original: None,
                            is_transposed: false,
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

    /// The tensors' names and stored types, sorted by name.
    pub fn dtypes(&self) -> impl Iterator<Item = (&str, Dtype)> {
        let tensors = self.tensors.iter();
        tensors.map(|(name, stored)| (name.as_str(), stored.dtype))
    }

    /// A tensor of any type, as it is stored: without its changes.
    ///
    /// # Errors
    /// [`Error::Weights`] if there is no tensor of this name; the reason lists similar ones. [`Error::Weights`] if it is
    /// stored the other way round than a component sees it.
    pub fn get(&self, name: &str) -> Result<WeightView<'_>> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| self.error(name, &[], &Fault::Absent))?;
        if stored.is_transposed {
            return Err(self.error(name, &stored.shape, &Fault::Transposed));
        }
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
        if self.changes.contains_key(name) {
            let mut values = Vec::new();
            self.fill_f32(name, expected, &mut values)?;
            return Ok(WeightData::owned(expected.to_vec(), values));
        }
        self.unchanged_f32(name, stored)
    }

    fn unchanged_f32(&self, name: &str, stored: &Stored) -> Result<WeightData> {
        let expanded = self
            .expanded
            .as_ref()
            .filter(|_| !self.replaced.contains_key(name));
        let (map, stored) = self.source(name, stored);
        let data = match expanded.and_then(|e| e.tensor(stored)) {
            Some(data) => data,
            None => WeightData::read(
                map,
                stored.range.clone(),
                stored.dtype,
                stored.shape.clone(),
            )
            .ok_or_else(|| self.error(name, &[], &Fault::Type(stored.dtype)))?,
        };
        Ok(stored.seen(data))
    }

    /// A tensor's values as f16: in place if they are stored as f16 at an aligned place, else rounded to nearest.
    ///
    /// # Errors
    /// As [`Weights::tensor_f32`], and if a finite value is beyond f16's largest, 65504.
    pub fn tensor_f16(&self, name: &str, expected: &[usize]) -> Result<WeightData<f16>> {
        let stored = self
            .fitting(name, expected)
            .map_err(|fault| self.error(name, expected, &fault))?;
        if self.changes.contains_key(name) {
            let (mut wide, mut values) = (Vec::new(), Vec::new());
            self.fill_f16(name, expected, &mut wide, &mut values)?;
            return Ok(WeightData::owned(expected.to_vec(), values));
        }
        let (map, source) = self.source(name, stored);
        let (range, shape) = (source.range.clone(), source.shape.clone());
        WeightData::read_half(map, range, source.dtype, shape)
            .map(|data| source.seen(data))
            .map_err(|unfit| self.unfit(name, stored, &unfit))
    }

    fn unfit(&self, name: &str, stored: &Stored, unfit: &Unfit) -> Error {
        let fault = match *unfit {
            Unfit::Type => Fault::Type(stored.dtype),
            Unfit::Overflow(value) => Fault::Overflow(value),
        };
        self.error(name, &stored.shape, &fault)
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

    /// The mapped files, in the order in which they were given.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|map| map.path.as_path())
    }
}

impl Stored {
    /// The values that lie in a file, in the order of the shape.
    fn seen<T: Element>(&self, data: WeightData<T>) -> WeightData<T> {
        if self.is_transposed {
            data.transposed()
        } else {
            data
        }
    }
}
