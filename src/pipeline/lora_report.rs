//! What a LoRA would change in a model, and by how much.
//!
//! No Python twin: diffusers tells the modules that it does not know in a warning, and nothing of the others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;

use super::Pipeline;
use super::loras::Opened;
use super::overlay::Overlay;
use crate::error::Result;
use crate::lora::{LoraFile, Matched};
use crate::progress::{Observer, Stage};
use crate::request::LoraUse;
use crate::weights::Weights;

/// What a file would change in a model at scale 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LoraReport {
    /// The file.
    pub file: PathBuf,
    /// Whose names its tensors have, or `overlay`.
    pub format: String,
    /// The model's name.
    pub model: String,
    /// By component of the model.
    pub components: BTreeMap<String, ComponentShare>,
    /// Changed tensors.
    pub changes: Vec<TensorChange>,
    /// Modules that the model does not have, with the reason.
    pub unmatched: BTreeMap<String, String>,
    /// Words that the file says it was trained to.
    pub triggers: Vec<TriggerWords>,
    /// Everything that the file says of itself.
    pub metadata: BTreeMap<String, String>,
}

/// How much of a component is changed, and how much that is. Norms are Frobenius', over all changed tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ComponentShare {
    /// Modules that change.
    pub modules: usize,
    /// Parameters in tensors that change.
    pub parameters: u64,
    /// Parameters of the component.
    pub of: u64,
    /// Norm of the change.
    pub change: f64,
    /// Norm of the tensors before it.
    pub weights: f64,
}

/// A changed tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TensorChange {
    /// Component of the model.
    pub component: String,
    /// Its name there.
    pub tensor: String,
    /// The module's name in the file.
    pub module: String,
    /// How the change is stored: `linear`, `convolution`, …
    pub kind: String,
    /// Whether it is a DoRA, which sets norms too.
    pub dora: bool,
    /// Rank, where there is one.
    pub rank: Option<usize>,
    /// Alpha, where the file has one.
    pub alpha: Option<f64>,
    /// Norm of the change.
    pub change: f64,
    /// Norm of the tensor before it.
    pub weights: f64,
}

/// Words to write in the prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TriggerWords {
    /// The words.
    pub phrase: String,
    /// Key of the metadata that has them.
    pub source: String,
    /// Captions of the training that had them.
    pub count: Option<u64>,
}

impl Pipeline {
    /// Says what a LoRA or an overlay would change in a model, without running anything. `lora` is a name of the
    /// catalogue's or a file.
    ///
    /// # Errors
    /// Those of opening the file and the model's weights.
    pub fn lora_report(
        &self,
        model: &str,
        lora: &str,
        observer: &mut Observer<'_>,
    ) -> Result<LoraReport> {
        let targets = self.targets(model, observer)?;
        let file = self.lora_file(lora, observer)?;
        let (opened, _) = Opened::open(&file)?;
        self.begin_stage(observer, Stage::Load, &format!("{lora} for {model}"))?;
        let mut report = LoraReport {
            file: file.path(),
            format: "overlay".into(),
            model: model.to_owned(),
            components: BTreeMap::new(),
            changes: Vec::new(),
            unmatched: BTreeMap::new(),
            triggers: Vec::new(),
            metadata: BTreeMap::new(),
        };
        match opened {
            Opened::Lora(lora) => report.tell(&lora, &targets)?,
            Opened::Overlay(overlay) => {
                let as_it_is = LoraUse {
                    lora: lora.to_owned(),
                    scale: 1.0,
                    te_scale: None,
                };
                self.check_overlay(&overlay, &as_it_is, (model, &targets), observer)?;
                report.tell_overlay(&overlay, &targets)?;
            }
        }
        report.sum(&targets);
        Ok(report)
    }
}

impl LoraReport {
    fn tell(&mut self, lora: &LoraFile, targets: &BTreeMap<String, Weights>) -> Result<()> {
        self.format = lora.format().to_string();
        self.metadata.clone_from(lora.metadata());
        let triggers = lora.triggers().into_iter().map(|t| TriggerWords {
            phrase: t.phrase,
            source: t.source,
            count: t.count,
        });
        self.triggers = triggers.collect();
        let fit = lora.fit(&targets.iter().map(|(key, w)| (key.clone(), w)).collect());
        for matched in &fit.matched {
            self.changes
                .push(TensorChange::of(matched, &targets[&matched.component])?);
        }
        let unmatched = fit.unmatched.into_iter();
        self.unmatched = unmatched.map(|u| (u.module, u.reason)).collect();
        Ok(())
    }

    fn tell_overlay(
        &mut self,
        overlay: &Overlay,
        targets: &BTreeMap<String, Weights>,
    ) -> Result<()> {
        self.metadata.clone_from(overlay.metadata());
        for (component, tensors) in overlay.tensors() {
            let weights = &targets[component];
            for tensor in tensors {
                let shape = weights.shape(tensor).unwrap_or_default().to_vec();
                let mut merged = weights.clone();
                overlay.replace(component, tensor, &mut merged)?;
                let (before, after) = (
                    weights.tensor_f32(tensor, &shape)?,
                    merged.tensor_f32(tensor, &shape)?,
                );
                let (before, after) = (before.as_slice(), after.as_slice());
                let apart = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
                let change: f64 = after.par_iter().zip(before).map(apart).sum();
                self.changes.push(TensorChange {
                    component: component.clone(),
                    tensor: tensor.clone(),
                    module: tensor.clone(),
                    kind: "overlay".into(),
                    dora: false,
                    rank: None,
                    alpha: None,
                    change: change.sqrt(),
                    weights: norm(before),
                });
            }
        }
        Ok(())
    }

    fn sum(&mut self, targets: &BTreeMap<String, Weights>) {
        let mut modules = BTreeSet::new();
        for change in &self.changes {
            let weights = &targets[&change.component];
            let values = |tensor: &str| {
                let shape = weights.shape(tensor).unwrap_or_default();
                shape.iter().product::<usize>() as u64
            };
            let share = self.components.entry(change.component.clone()).or_default();
            if share.of == 0 {
                share.of = weights.names().map(values).sum();
            }
            let new = modules.insert((&change.component, &change.module));
            share.modules += usize::from(new);
            share.parameters += values(&change.tensor);
            share.change = share.change.hypot(change.change);
            share.weights = share.weights.hypot(change.weights);
        }
    }
}

impl TensorChange {
    fn of(matched: &Matched, weights: &Weights) -> Result<Self> {
        let base = weights.tensor_f32(&matched.tensor, matched.shape())?;
        Ok(Self {
            component: matched.component.clone(),
            tensor: matched.tensor.clone(),
            module: matched.module.clone(),
            kind: matched.form.to_string(),
            dora: matched.dora.is_some(),
            rank: matched.rank,
            alpha: matched.alpha,
            change: norm(&matched.delta(&base)?),
            weights: norm(base.as_slice()),
        })
    }
}

/// The square root of the sum of squares.
fn norm(values: &[f32]) -> f64 {
    let squares = values.par_iter().map(|value| f64::from(*value).powi(2));
    squares.sum::<f64>().sqrt()
}
