//! What a catalogue's entry must not say.

use std::path::{Component, Path};

use super::lora::check_guidance;
use super::{FileRef, Model, VaeFacts};

/// Longest token sequence; CLIP's is 77.
const MAX_TOKENS: usize = 4096;
/// Most channels of latents, and most pixels along a latent's side.
const MAX_LATENT: usize = 256;

impl Model {
    pub(super) fn check(&self) -> Result<(), String> {
        self.check_files()?;
        for required in ["kv", "unet", "vae_decoder"] {
            if !self.graphs.contains_key(required) {
                return Err(format!(
                    "graphs: `{required}` is missing; export the model again"
                ));
            }
        }
        self.check_text()?;
        self.check_adapters()?;
        self.vae.check()?;
        let positive = [
            ("unet.in_channels", self.unet.in_channels),
            ("unet.sample_size", self.unet.sample_size),
            ("defaults.width", self.defaults.width),
            ("defaults.height", self.defaults.height),
            ("defaults.steps", self.defaults.steps),
            ("distilled_steps", self.distilled_steps.unwrap_or(1)),
        ];
        positive
            .iter()
            .find(|(_, v)| *v == 0)
            .map_or(Ok(()), |(key, _)| Err(format!("{key}: must not be 0")))?;
        check_guidance(Some(self.defaults.guidance))?;
        if self.unet.in_channels != self.vae.latent_channels {
            return Err(format!(
                "unet.in_channels: is {}, but the VAE's latents have {} channels",
                self.unet.in_channels, self.vae.latent_channels
            ));
        }
        let ids = if self.requires_aesthetics_score { 5 } else { 6 };
        if self.unet.time_ids != ids {
            return Err(format!(
                "unet.time_ids: is {}, but requires_aesthetics_score: {} means {ids}",
                self.unet.time_ids, self.requires_aesthetics_score
            ));
        }
        Ok(())
    }

    /// Every graph has weights, and every file is one.
    fn check_files(&self) -> Result<(), String> {
        for (component, graph) in &self.graphs {
            let key = graph.weights.as_str();
            if !self.weights.contains_key(key) && !self.is_in_checkpoint(key) {
                return Err(format!(
                    "graphs.{component}.weights: no `{}` under weights",
                    graph.weights
                ));
            }
            if graph.files().next().is_none() {
                return Err(format!(
                    "graphs.{component}: needs at least one of `fused`, `cuda` and `plain`"
                ));
            }
        }
        for (component, files) in &self.weights {
            if files.is_empty() {
                return Err(format!("weights.{component}: lists no file"));
            }
            files
                .iter()
                .try_for_each(|f| f.check().map_err(|e| format!("weights.{component}: {e}")))?;
        }
        if let Some(file) = &self.checkpoint {
            file.check().map_err(|e| format!("checkpoint: {e}"))?;
        }
        Ok(())
    }

    fn check_text(&self) -> Result<(), String> {
        if self.text.iter().filter(|t| t.pooled).count() != 1 {
            return Err("text: exactly one encoder must have `pooled: true`".into());
        }
        for entry in &self.text {
            if !self.graphs.contains_key(&entry.encoder) {
                return Err(format!("text: no graph `{}`", entry.encoder));
            }
            let t = &entry.tokenizer;
            let files = [&t.vocab, &t.merges, &t.json].map(Option::is_some);
            if !matches!(files, [true, true, false] | [false, false, true]) {
                return Err(format!(
                    "text.{}.tokenizer: needs `vocab` and `merges`, or `json`",
                    entry.encoder
                ));
            }
            if !(3..=MAX_TOKENS).contains(&t.length) {
                return Err(format!(
                    "text.{}.tokenizer.length: must be 3 to {MAX_TOKENS}",
                    entry.encoder
                ));
            }
            for file in [&t.vocab, &t.merges, &t.json].into_iter().flatten() {
                file.check()
                    .map_err(|e| format!("text.{}.tokenizer: {e}", entry.encoder))?;
            }
        }
        Ok(())
    }
}

impl VaeFacts {
    fn check(&self) -> Result<(), String> {
        if !self.scaling_factor.is_finite() || self.scaling_factor == 0.0 {
            return Err(format!(
                "vae.scaling_factor: {} cannot divide latents",
                self.scaling_factor
            ));
        }
        if self.shift_factor.is_some() {
            return Err(
                "vae.shift_factor: SDXL's VAEs have none, and its pipeline applies none".into(),
            );
        }
        if self.scale > MAX_LATENT || self.latent_channels > MAX_LATENT {
            return Err(format!(
                "vae: scale and latent_channels must be at most {MAX_LATENT}"
            ));
        }
        if self.scale == 0 || self.latent_channels == 0 || self.sample_size < self.scale {
            return Err(
                "vae: scale and latent_channels must not be 0, sample_size not below scale".into(),
            );
        }
        for (key, values) in [
            ("latents_mean", &self.latents_mean),
            ("latents_std", &self.latents_std),
        ] {
            if values
                .as_ref()
                .is_some_and(|v| v.len() != self.latent_channels)
            {
                return Err(format!("vae.{key}: needs {} numbers", self.latent_channels));
            }
        }
        if self.latents_mean.is_some() != self.latents_std.is_some() {
            return Err("vae: latents_mean and latents_std go together".into());
        }
        Ok(())
    }
}

impl FileRef {
    /// A hub name becomes part of a path in the cache, so it must not be able to leave it.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self::Hub(hub) = self else { return Ok(()) };
        let plain = |s: &str| !s.is_empty() && !s.contains(['\\', '\0', ':']);
        let inside = |s: &str| {
            Path::new(s)
                .components()
                .all(|c| matches!(c, Component::Normal(_)))
        };
        if !plain(&hub.file) || !inside(&hub.file) {
            return Err(format!(
                "file `{}` is not a path inside a repository",
                hub.file
            ));
        }
        if !plain(&hub.repo) || !inside(&hub.repo) || hub.repo.split('/').count() != 2 {
            return Err(format!("repo `{}` is not owner/name", hub.repo));
        }
        Ok(())
    }
}
