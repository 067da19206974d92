//! LoRAs in the catalogue, and what one of them or a variant of a model gives a request in place of the model's defaults.

use serde::Deserialize;

use super::{Defaults, Family, FileRef, Model};
use crate::schedule::SchedulerConfig;
use crate::schedulers::SchedulerKind;

/// A LoRA that requests may call by a name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraEntry {
    /// Which models it is for.
    pub family: Family,
    /// Its `.safetensors`.
    pub file: FileRef,
    /// Its licence, if known.
    #[serde(default)]
    pub licence: Option<String>,
    /// Keys that it replaces in the configuration of the model's scheduler.
    #[serde(default)]
    pub scheduler: SchedulerConfig,
    /// Defaults of a request with it, in place of the model's.
    #[serde(default)]
    pub defaults: DefaultsOver,
    /// As [`Model::distilled_steps`], of a model with it.
    #[serde(default)]
    pub distilled_steps: Option<usize>,
}

/// Some of a model's [`Defaults`], in place of its own.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultsOver {
    /// Picture width, px.
    pub width: Option<usize>,
    /// Picture height, px.
    pub height: Option<usize>,
    /// Denoising steps.
    pub steps: Option<usize>,
    /// Guidance scale.
    pub guidance: Option<f64>,
    /// Update rule.
    pub scheduler: Option<SchedulerKind>,
}

impl Defaults {
    /// Replaces those that `over` has.
    pub(crate) fn take(&mut self, over: &DefaultsOver) {
        self.width = over.width.unwrap_or(self.width);
        self.height = over.height.unwrap_or(self.height);
        self.steps = over.steps.unwrap_or(self.steps);
        self.guidance = over.guidance.unwrap_or(self.guidance);
        self.scheduler = over.scheduler.or(self.scheduler);
    }
}

impl LoraEntry {
    pub(super) fn check(&self, name: &str) -> Result<(), String> {
        if name.is_empty() || name.contains(['@', ':']) {
            return Err("a name must not be empty, nor have `@` or `:` in it".into());
        }
        self.file.check().map_err(|e| format!("file: {e}"))?;
        check_keys(&self.scheduler)?;
        let positive = [
            ("defaults.width", self.defaults.width),
            ("defaults.height", self.defaults.height),
            ("defaults.steps", self.defaults.steps),
            ("distilled_steps", self.distilled_steps),
        ];
        match positive.iter().find(|(_, value)| *value == Some(0)) {
            Some((key, _)) => Err(format!("{key}: must not be 0")),
            None => check_guidance(self.defaults.guidance),
        }
    }

    /// Whether it is for `model`; the reason if not.
    pub(crate) fn fits(&self, model: &Model) -> Result<(), String> {
        if self.family == model.family {
            return Ok(());
        }
        Err(format!(
            "is for models of the family {}, not {}",
            self.family.name(),
            model.family.name()
        ))
    }
}

/// Refuses keys that no scheduler reads: a misspelt one would have no effect.
pub(super) fn check_keys(scheduler: &SchedulerConfig) -> Result<(), String> {
    match scheduler.unknown_key() {
        Some(key) => Err(format!(
            "scheduler.{key}: no scheduler of this engine reads it"
        )),
        None => Ok(()),
    }
}

/// Refuses guidance that is no number.
pub(super) fn check_guidance(guidance: Option<f64>) -> Result<(), String> {
    match guidance.filter(|guidance| !guidance.is_finite()) {
        Some(guidance) => Err(format!(
            "defaults.guidance: {guidance} is not a finite number"
        )),
        None => Ok(()),
    }
}
