//! LoRAs of a request: opened, fitted to the base model's components, and attached to its weights on their way into graphs.
//!
//! Twin: diffusers' `load_lora_weights`, `set_adapters` and `fuse_lora`; nothing is fused into the checkpoint, which stays
//! mapped, and a LoRA with a scale of 0 is not even read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::Pipeline;
use super::overlay::Overlay;
use crate::error::{Error, Result, quoted};
use crate::graph::Graph;
use crate::lora::{Fit, LoraFile, Matched, Unmatched, change};
use crate::memory::MemoryMode;
use crate::model_file::ModelFile;
use crate::plan::names;
use crate::progress::{Event, Observer};
use crate::request::{LoraSet, LoraUse};
use crate::weights::{Change, Weights};

/// Sets of LoRAs that a pipeline remembers: enough for some runs that take turns.
const REMEMBERED: usize = 4;
/// Modules that a message names.
const TOLD: usize = 20;

/// How a network is loaded.
#[derive(Debug, Clone)]
pub(super) struct Loading {
    pub(super) memory: MemoryMode,
    /// What becomes of the base model's weights; `None` where nothing does.
    pub(super) loras: Option<Arc<Applied>>,
}

impl From<MemoryMode> for Loading {
    fn from(memory: MemoryMode) -> Self {
        let loras = None;
        Self { memory, loras }
    }
}

impl Loading {
    /// What becomes of a model's weights with some key.
    pub(super) fn changed(&self, model: &str, weights: &str) -> Option<&Changed> {
        let applied = self.loras.as_ref()?;
        let components = (applied.set.model == model).then_some(&applied.components);
        components?.get(weights)
    }
}

/// A set of LoRAs and what it makes of a model.
#[derive(Debug)]
pub(super) struct Applied {
    set: LoraSet,
    /// What the files were when they were opened, those of the model included.
    stamps: Vec<String>,
    warnings: Vec<String>,
    components: BTreeMap<String, Changed>,
}

/// What becomes of one component's weights.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// By what networks with these changes are known: the files, and the bits of their scales.
    marks: Vec<(String, u64)>,
    replaced: Vec<(String, Arc<Overlay>)>,
    changes: Vec<(Arc<Matched>, Arc<dyn Change>)>,
}

impl Changed {
    pub(super) fn marks(&self) -> &[(String, u64)] {
        &self.marks
    }

    /// Has the component's weights give the changed tensors.
    pub(super) fn attach(&self, component: &str, weights: &mut Weights) -> Result<()> {
        for (tensor, overlay) in &self.replaced {
            overlay.replace(component, tensor, weights)?;
        }
        for (matched, change) in &self.changes {
            weights.change(&matched.tensor, Arc::clone(change))?;
        }
        Ok(())
    }

    /// The tensors that are not the component's own, sorted.
    pub(super) fn tensors(&self) -> BTreeSet<&str> {
        let replaced = self.replaced.iter().map(|(tensor, _)| tensor.as_str());
        let changed = self.changes.iter().map(|(m, _)| m.tensor.as_str());
        replaced.chain(changed).collect()
    }

    /// Bytes of a graph's weights that these changes keep from being used where they lie in a file.
    pub(super) fn bytes(&self, component: &str, graph: &Graph) -> u64 {
        let mut held = self
            .changes
            .iter()
            .map(|(m, _)| m.tensor.as_str())
            .collect::<BTreeSet<_>>();
        let copied = self
            .replaced
            .iter()
            .filter(|(tensor, o)| !o.is_wide(component, tensor));
        held.extend(copied.map(|(tensor, _)| tensor.as_str()));
        graph.weight_bytes_of(|name| held.contains(name))
    }
}

/// Sets that were opened, the latest last.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<Vec<Arc<Applied>>>);

impl Remembered {
    fn find(&self, fits: impl Fn(&Applied) -> bool) -> Option<Arc<Applied>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|applied| fits(applied)).cloned()
    }

    fn keep(&self, applied: &Arc<Applied>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|other| other.set != applied.set);
        known.push(Arc::clone(applied));
        let surplus = known.len().saturating_sub(REMEMBERED);
        known.drain(..surplus);
    }
}

/// A file of a set.
pub(super) enum Opened {
    Lora(LoraFile),
    Overlay(Overlay),
}

impl Opened {
    /// The file, and what it is now.
    pub(super) fn open(file: &ModelFile) -> Result<(Self, String)> {
        let weights = Weights::open(std::slice::from_ref(file))?;
        let stamp = weights.stamp();
        let opened = match Overlay::of(weights)? {
            Some(overlay) => Self::Overlay(overlay),
            None => Self::Lora(LoraFile::open(file)?),
        };
        Ok((opened, stamp))
    }
}

impl Pipeline {
    /// How networks are loaded with a set of LoRAs. The files are those that were found when the run began.
    pub(super) fn loading(
        &self,
        memory: MemoryMode,
        set: &LoraSet,
        observer: &mut Observer<'_>,
    ) -> Result<Loading> {
        if set.uses.is_empty() {
            return Ok(memory.into());
        }
        let loras = match self.loras.find(|known| known.set == *set) {
            Some(known) => Some(known),
            None => self.open_loras(set, observer)?,
        };
        Ok(Loading { memory, loras })
    }

    /// Opens a set of LoRAs as its files are now, and tells what does not fit.
    pub(super) fn open_loras(
        &self,
        set: &LoraSet,
        observer: &mut Observer<'_>,
    ) -> Result<Option<Arc<Applied>>> {
        if set.uses.is_empty() {
            return Ok(None);
        }
        let targets = self.targets(&set.model, observer)?;
        let opened = set.uses.iter().map(|lora| {
            let file = self.lora_file(&lora.lora, observer)?;
            Opened::open(&file)
        });
        let opened = opened.collect::<Result<Vec<_>>>()?;
        let stamps = targets.values().map(Weights::stamp);
        let stamps: Vec<_> = stamps
            .chain(opened.iter().map(|(_, stamp)| stamp.clone()))
            .collect();
        let known = self
            .loras
            .find(|known| known.set == *set && known.stamps == stamps);
        let applied = if let Some(known) = known {
            known
        } else {
            let mut applied = Applied::new(set);
            self.apply(&mut applied, &targets, opened, observer)?;
            applied.stamps = stamps;
            Arc::new(applied)
        };
        for warning in &applied.warnings {
            self.notify(observer, Event::Warning(warning), 0)?;
        }
        self.loras.keep(&applied);
        Ok(Some(applied))
    }

    fn apply(
        &self,
        applied: &mut Applied,
        targets: &BTreeMap<String, Weights>,
        opened: Vec<(Opened, String)>,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let set = applied.set.clone();
        for (lora, (opened, stamp)) in set.uses.iter().zip(opened) {
            match opened {
                Opened::Lora(file) => {
                    let fit = file.fit(&targets.iter().map(|(k, w)| (k.clone(), w)).collect());
                    applied
                        .warnings
                        .extend(check_fit(&file, &fit, &set, &lora.lora)?);
                    applied.add(lora, &stamp, fit);
                }
                Opened::Overlay(overlay) => {
                    self.check_overlay(&overlay, lora, (&set.model, targets), observer)?;
                    applied.put(&stamp, overlay)?;
                }
            }
        }
        for component in applied.components.values_mut() {
            // What commutes comes last, so that the order in which such LoRAs are named is the only one that counts.
            component.changes.sort_by_key(|(m, _)| m.commutes());
        }
        Ok(())
    }

    /// The weights that LoRAs may change, those of the UNet and the text encoders, by key.
    pub(super) fn targets(
        &self,
        name: &str,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<String, Weights>> {
        let model = self.catalogue().model("model", name)?;
        let encoders = model.text.iter().map(|t| t.encoder.as_str());
        let components = [names::UNET, names::KV].into_iter().chain(encoders);
        let mut targets = BTreeMap::new();
        for entry in components.filter_map(|component| model.graphs.get(component)) {
            if !targets.contains_key(&entry.weights) {
                let weights = self.weights(model, &entry.weights, observer)?;
                targets.insert(entry.weights.clone(), weights);
            }
        }
        Ok(targets)
    }

    /// The file of a LoRA: one of the catalogue, after a download if need be, or one on this machine.
    pub(super) fn lora_file(&self, lora: &str, observer: &mut Observer<'_>) -> Result<ModelFile> {
        if let Some(entry) = self.catalogue().loras.get(lora) {
            return self.file(&entry.file, observer);
        }
        let file = ModelFile::from(lora);
        if file.exists() {
            return Ok(file);
        }
        let known = self.catalogue().loras.keys().map(|name| quoted(name));
        let mut known = known.collect::<Vec<_>>().join(", ");
        if known.is_empty() {
            known = "none".into();
        }
        Err(Error::Missing {
            path: file.path(),
            remedy: format!(
                "name a .safetensors file, or one of the catalogue's loras, which are: {known}"
            ),
        })
    }
}

impl Applied {
    fn new(set: &LoraSet) -> Self {
        Self {
            set: set.clone(),
            stamps: Vec::new(),
            warnings: Vec::new(),
            components: BTreeMap::new(),
        }
    }

    pub(super) fn components(&self) -> &BTreeMap<String, Changed> {
        &self.components
    }

    fn add(&mut self, lora: &LoraUse, stamp: &str, fit: Fit) {
        let mut marked = BTreeSet::new();
        for matched in fit.matched {
            let component = matched.component.as_str();
            let scale = lora.scale_of(component);
            if scale == 0.0 {
                continue;
            }
            let changed = self.components.entry(component.to_owned()).or_default();
            if marked.insert(component.to_owned()) {
                changed.marks.push((stamp.to_owned(), scale.to_bits()));
            }
            let matched = Arc::new(matched);
            let change = change(Arc::clone(&matched), scale);
            changed.changes.push((matched, change));
        }
    }

    fn put(&mut self, stamp: &str, overlay: Overlay) -> Result<()> {
        let overlay = Arc::new(overlay);
        for (component, tensors) in overlay.tensors() {
            let changed = self.components.entry(component.clone()).or_default();
            if !changed.replaced.is_empty() {
                let reason = "is the second overlay of one run; merge all LoRAs into one";
                return Err(Error::request(
                    "lora",
                    format!("{} {reason}", overlay.path()),
                ));
            }
            changed.marks.push((stamp.to_owned(), 1.0_f64.to_bits()));
            let tensors = tensors.iter().cloned();
            changed
                .replaced
                .extend(tensors.map(|tensor| (tensor, Arc::clone(&overlay))));
        }
        Ok(())
    }
}

/// What does not fit is an error, or a warning where the set is lenient; that nothing fits is an error always.
fn check_fit(file: &LoraFile, fit: &Fit, set: &LoraSet, name: &str) -> Result<Option<String>> {
    let Fit { matched, unmatched } = fit;
    if unmatched.is_empty() && !matched.is_empty() {
        return Ok(None);
    }
    let told = unmatched
        .iter()
        .take(TOLD)
        .map(|Unmatched { module, reason }| format!("{} {reason}", quoted(module)));
    let mut told = told.collect::<Vec<_>>().join("; ");
    if unmatched.len() > TOLD {
        told = format!(
            "{told}; and {} more, which `tronie lora` lists",
            unmatched.len() - TOLD
        );
    }
    let (count, model) = (unmatched.len(), &set.model);
    let whole = format!("{count} modules of the LoRA do not fit {model}: {told}");
    let fail = |reason| Error::Weights {
        path: file.path().to_owned(),
        reason,
    };
    if matched.is_empty() {
        return Err(fail(format!("none of its modules fits {model}: {told}")));
    }
    if set.lenient {
        return Ok(Some(format!("{name}: {whole}")));
    }
    Err(fail(format!(
        "{whole}. With --lora-lenient the {} that fit are applied",
        matched.len()
    )))
}
