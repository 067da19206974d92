//! LoRAs: small files that change a model's weights, in every form in which they are shared.
//!
//! A file is opened ([`LoraFile::open`]), fitted to the model's components ([`LoraFile::fit`]), and each fitted module
//! becomes a [`Change`] of one tensor ([`change`]). What is named in a file and cannot be used is told, never skipped.
//!
//! The strength of a change is linear for every form: `W + strength · (W' − W)`. Plain changes add up, in any order; those
//! with magnitudes (DoRA) do not, and are meant to come first ([`Matched::commutes`]).
//!
//! Python twin: `load_lora_weights` of diffusers, PEFT, LyCORIS. Paper: arXiv:2106.09685.

mod cholesky;
mod config;
mod factors;
mod format;
mod keys;
mod mergers;
mod modules;
mod names;
mod triggers;
mod update;
mod values;
mod zip;
mod zipped;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use factors::LowRank;
pub use format::Format;
pub use triggers::Trigger;
pub use update::Axis;
pub use zip::{Mergers, Moments, Terms};
pub use zipped::Pair;

use config::Configs;
use modules::{Modules, Part};
use names::{Names, Place};
use update::Update;

use crate::error::{Error, Result, quoted};
use crate::model_file::ModelFile;
use crate::weights::{Change, WeightData, Weights};

/// A LoRA's file, mapped: its modules are known and checked, its values are read when they are applied.
#[derive(Debug)]
pub struct LoraFile {
    path: PathBuf,
    weights: Arc<Weights>,
    format: Format,
    modules: Modules,
}

/// What a file changes in a model, and what it has that the model does not.
#[derive(Debug, Default)]
pub struct Fit {
    /// One entry a changed tensor.
    pub matched: Vec<Matched>,
    /// One entry a module, or a tensor, that cannot be applied.
    pub unmatched: Vec<Unmatched>,
}

/// How the change of a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// Two matrices.
    Linear,
    /// Two matrices, the first a convolution with a kernel (LoCon).
    Conv,
    /// Two matrices and a core that has the kernel.
    Tucker,
    /// The elementwise product of two low-rank matrices.
    Loha,
    /// A Kronecker product.
    Lokr,
    /// The difference itself.
    Full,
    /// A bias's difference.
    Bias,
}

/// A changed tensor of the model.
#[derive(Debug)]
pub struct Matched {
    /// The component, by its key into the model's weights, such as `unet`.
    pub component: String,
    /// The tensor's name in the component's file.
    pub tensor: String,
    /// The module's name in the LoRA's file.
    pub module: String,
    /// How the change is stored.
    pub form: Form,
    /// Along what a DoRA keeps norms; `None` for a plain change.
    pub dora: Option<Axis>,
    /// The rank that alpha is divided by, where there is one.
    pub rank: Option<usize>,
    /// Alpha, where the file has one; without it, it is as large as the rank.
    pub alpha: Option<f64>,
    update: Arc<Update>,
    shape: Vec<usize>,
    file: Arc<Weights>,
}

/// What a file has and the model cannot take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmatched {
    /// The module's name in the file, or a tensor's that belongs to no module.
    pub module: String,
    /// Why, as the end of "this module …".
    pub reason: String,
}

impl LoraFile {
    /// Opens a file and checks it without knowing the model.
    ///
    /// # Errors
    /// [`Error::Missing`] if it is not there; [`Error::Weights`] if it is no well-formed safetensors file, no LoRA, one
    /// for another family of models, its tensors do not belong together, or a value is not finite.
    pub fn open(file: &ModelFile) -> Result<Self> {
        Self::of(Weights::open(std::slice::from_ref(file))?)
    }

    /// As [`LoraFile::open`], of a file's content in memory; `path` is what errors call it.
    ///
    /// # Errors
    /// As [`LoraFile::open`].
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self> {
        Self::of(Weights::from_bytes(path, bytes)?)
    }

    fn of(weights: Weights) -> Result<Self> {
        let path = weights.paths().next().map(Path::to_owned);
        let path = path.unwrap_or_default();
        let fault = |reason| Error::Weights {
            path: path.clone(),
            reason,
        };
        let format = format::recognise(&weights).map_err(fault)?;
        let configs = Configs::of(weights.metadata()).map_err(fault)?;
        let modules = Modules::of(&weights, &configs).map_err(fault)?;
        values::check(&weights).map_err(fault)?;
        Ok(Self {
            weights: Arc::new(weights),
            format,
            modules,
            path,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose names its tensors have.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The text in its header, by key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.weights.metadata()
    }

    /// The words that its maker says it was trained to, first those that are named as such.
    pub fn triggers(&self) -> Vec<Trigger> {
        triggers::triggers(self.metadata())
    }

    /// Finds the modules in a model; `targets` are its components by their keys into the model's weights.
    pub fn fit(&self, targets: &BTreeMap<String, &Weights>) -> Fit {
        let names = Names::of(targets);
        let mut fit = Fit {
            matched: Vec::new(),
            unmatched: self.modules.strangers.clone(),
        };
        let mut taken: BTreeMap<(String, String), &str> = BTreeMap::new();
        for (name, module) in &self.modules.by_name {
            let place = match (&module.refused, names.find(name)) {
                (Some(reason), _) => Err(reason.clone()),
                (None, None) => Err("is not in the model".into()),
                (None, Some(place)) => Ok(place),
            };
            let parts = [(&module.weight, "weight"), (&module.bias, "bias")];
            let parts = parts
                .into_iter()
                .filter_map(|(part, kind)| Some((part.as_ref()?, kind)));
            let matched = place.and_then(|place| {
                let (component, tensors) = (&place.component, &place.module);
                if let Some(other) = taken.insert((component.clone(), tensors.clone()), name) {
                    return Err(format!(
                        "is the same as {}: it is not known which counts",
                        quoted(other)
                    ));
                }
                let target = targets.get(component).copied();
                let target =
                    target.ok_or_else(|| format!("is in {component}, which is not there"))?;
                parts
                    .map(|(part, kind)| self.matched(name, part, place, (target, kind)))
                    .collect::<Result<Vec<_>, String>>()
            });
            match matched {
                Ok(matched) => fit.matched.extend(matched),
                Err(reason) => fit.unmatched.push(Unmatched {
                    module: name.clone(),
                    reason,
                }),
            }
        }
        fit
    }

    fn matched(
        &self,
        name: &str,
        part: &Part,
        place: &Place,
        (target, kind): (&Weights, &str),
    ) -> Result<Matched, String> {
        let tensor = format!("{}.{kind}", place.module);
        let shape = target
            .shape(&tensor)
            .ok_or_else(|| format!("has a {kind}, and the model's layer has none"))?;
        part.check(shape)?;
        Ok(Matched {
            component: place.component.clone(),
            tensor,
            module: name.to_owned(),
            form: part.form,
            dora: part
                .update
                .magnitude
                .as_ref()
                .map(|magnitude| magnitude.axis),
            rank: part.rank,
            alpha: part.alpha,
            update: Arc::clone(&part.update),
            shape: shape.to_vec(),
            file: Arc::clone(&self.weights),
        })
    }
}

impl Matched {
    /// The tensor's shape in the model.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The LoRA's file.
    fn path(&self) -> Option<&Path> {
        self.file.paths().next()
    }

    /// What the product of the factors is multiplied by at scale 1: alpha / rank, or alpha / √rank.
    pub fn factor(&self) -> f64 {
        self.update.scale
    }

    /// Whether the order of this change and others of the same tensor makes no difference beyond rounding.
    pub fn commutes(&self) -> bool {
        self.dora.is_none()
    }

    /// What is added to the tensor at scale 1: row-major values of the tensor's shape. `base` is the tensor unchanged,
    /// which only a DoRA's depend on.
    ///
    /// # Errors
    /// [`Error::Weights`] if the file holds values that cannot be used, or `base` has another shape.
    pub fn delta(&self, base: &WeightData) -> Result<Vec<f32>> {
        let base = base.as_slice();
        let mut values = if self.commutes() {
            vec![0.0; base.len()]
        } else {
            base.to_vec()
        };
        self.update
            .apply(&self.file, 1.0, &mut values, &self.shape)?;
        if !self.commutes() {
            values
                .iter_mut()
                .zip(base)
                .for_each(|(to, base)| *to -= base);
        }
        Ok(values)
    }

    /// The two factors of a plain low-rank change; `None` for every other form.
    ///
    /// # Errors
    /// As [`Matched::delta`].
    pub fn low_rank(&self) -> Result<Option<LowRank>> {
        if !self.commutes() {
            return Ok(None);
        }
        let loaded = self.update.factors.read(&self.file)?;
        Ok(loaded.low_rank(self.update.scale as f32))
    }
}

/// A change at a scale, to be handed to [`Weights::change`].
pub fn change(matched: Arc<Matched>, scale: f64) -> Arc<dyn Change> {
    Arc::new(Scaled { matched, scale })
}

#[derive(Debug)]
struct Scaled {
    matched: Arc<Matched>,
    scale: f64,
}

impl Change for Scaled {
    fn apply(&self, values: &mut [f32], shape: &[usize]) -> Result<()> {
        let Matched { update, file, .. } = &*self.matched;
        update.apply(file, self.scale, values, shape)
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Conv => "convolution",
            Self::Tucker => "Tucker",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
            Self::Full => "full",
            Self::Bias => "bias",
        })
    }
}
