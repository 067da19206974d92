//! A request whose every value is chosen.

use super::{GuidanceRuns, ImagePrompt, LoraSet, LoraUse, Request, Size, VaeTiling};
use crate::error::{Error, Result};
use crate::memory::MemoryMode;
use crate::schedule::{SamplingOptions, SchedulerConfig};
use crate::schedulers::SchedulerKind;

/// Side of a VAE tile in the mode `low`, px: SDXL's decoder takes less than 1 GiB for it.
const LOW_MEMORY_TILE: usize = 512;

/// A request without gaps: every value that decides the picture, chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The request with every default filled in.
    pub request: Request,
    /// Name of the base model.
    pub model: String,
    /// Picture size, px.
    pub size: Size,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale, where the request has no list of them.
    pub guidance: f64,
    /// Guidance rescale, `0.0..=1.0`.
    pub guidance_rescale: f64,
    /// How the halves of guidance run.
    pub guidance_runs: GuidanceRuns,
    /// Update rule.
    pub scheduler: SchedulerKind,
    /// Seeds of the noise: one for all pictures, or one for each.
    pub seeds: Vec<u64>,
    /// Pictures in one run.
    pub batch: usize,
    /// Refiner and the share of the schedule before it.
    pub refine: Option<(String, f64)>,
    /// Places in the request of the image prompts whose scale is not 0 in all layers ([`Resolved::image_prompts`]).
    pub image_prompts: Vec<usize>,
    /// Configuration of the base model's scheduler, with what the LoRAs replace in it.
    pub scheduler_config: SchedulerConfig,
    /// Steps that the base model and LoRAs were distilled for, by their names.
    pub distilled: Vec<(String, usize)>,
}

impl Resolved {
    /// The memory mode that was asked for or settled; `balanced` as long as it is neither.
    pub fn memory(&self) -> MemoryMode {
        self.request.memory.unwrap_or(MemoryMode::Balanced)
    }

    /// Settles what the memory mode decides; `native_tile` is the native side of the decoder's picture, px.
    pub fn settle_memory(&mut self, mode: MemoryMode, native_tile: usize) {
        self.request.memory = Some(mode);
        if mode == MemoryMode::Low && self.request.vae_tiling.is_none() {
            self.request.vae_tiling = Some(VaeTiling::Tile(LOW_MEMORY_TILE.min(native_tile)));
        }
    }

    /// The guidance scale at a zero-based step of `steps`.
    pub fn guidance_at(&self, step: usize, steps: usize) -> f64 {
        let Some(list) = &self.request.guidance_list else {
            return self.guidance;
        };
        let last = list.len().saturating_sub(1);
        let place = (step * last) as f64 / steps.saturating_sub(1).max(1) as f64;
        let at = (place as usize).min(last);
        let (from, to) = (list[at], list[(at + 1).min(last)]);
        from + (to - from) * (place - at as f64)
    }

    /// The image prompts that a model is told, with their places in the request: the base model those whose scale is not 0
    /// in all layers, a refiner none.
    pub fn image_prompts(&self, model: &str) -> impl Iterator<Item = (usize, &ImagePrompt)> {
        let all = self.request.image_prompts.as_deref().unwrap_or_default();
        let heard = if self.model == model {
            self.image_prompts.as_slice()
        } else {
            &[]
        };
        heard.iter().filter_map(|at| Some((*at, all.get(*at)?)))
    }

    /// The LoRAs whose scales are not all 0, in their order.
    pub fn loras(&self) -> impl Iterator<Item = &LoraUse> {
        let all = self.request.loras.iter().flatten();
        all.filter(|lora| !lora.is_off())
    }

    /// What changes the base model.
    pub fn lora_set(&self) -> LoraSet {
        LoraSet {
            model: self.model.clone(),
            uses: self.loras().cloned().collect(),
            lenient: self.request.lora_lenient.unwrap_or(false),
        }
    }

    /// What the request says about its schedule.
    pub fn sampling(&self) -> SamplingOptions {
        let request = &self.request;
        SamplingOptions {
            steps: self.steps,
            spacing: request.spacing,
            sigmas: request.sigmas,
            sigma_range: request.sigma_range,
            sigmas_list: request.sigmas_list.clone(),
            timesteps_list: request.timesteps_list.clone(),
            final_sigma: request.final_sigma,
            lower_order_final: request.lower_order_final,
            solver_order: request.solver_order,
            eta: request.eta,
            zero_snr: request.zero_snr,
            diffusers_quirks: request.diffusers_quirks.unwrap_or(false),
        }
    }

    /// Whether latents of `before`, saved when `done` steps were done, can go on as `self`: what shaped them must be the
    /// same, so that the request in the final picture is true of the whole run. The refiner may change as long as none
    /// has run: `handoff` gives the step where one takes over.
    ///
    /// # Errors
    /// [`Error::Request`] that names the field.
    pub fn continues(
        &self,
        before: &Self,
        done: usize,
        handoff: impl Fn(f64) -> usize,
    ) -> Result<()> {
        let to_come = |r: &Self| r.refine.as_ref().is_none_or(|(_, at)| handoff(*at) >= done);
        let refiner_is_free = to_come(self) && to_come(before);
        let fixed = |r: &Self| {
            let mut request = r.request.without_places();
            (request.models, request.provider) = (None, None);
            (request.memory, request.vae_tiling) = (None, None);
            if refiner_is_free {
                (request.refiner, request.refine_at) = (None, None);
            }
            serde_json::to_value(request).unwrap_or_default()
        };
        let (now, then) = (fixed(self), fixed(before));
        let fields = now
            .as_object()
            .into_iter()
            .chain(then.as_object())
            .flat_map(|o| o.keys());
        match fields
            .into_iter()
            .find(|field| now.get(field) != then.get(field))
        {
            Some(field) => Err(Error::request(
                "latents-in",
                format!("`{field}` cannot change while going on from saved latents"),
            )),
            None => Ok(()),
        }
    }
}
