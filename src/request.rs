//! A request: everything that decides the picture, in one type for the command line, JSON files and libraries.
//!
//! A field left out takes the model's default ([`Request::resolve`]). A resolved request, written into every picture,
//! makes that picture again bit for bit.

mod resolve;
mod text_forms;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use resolve::Resolved;

use crate::error::{Error, Result};
use crate::memory::MemoryMode;
use crate::provider::Provider;
use crate::schedule::{FinalSigma, SigmaCurve, SigmaRange, Spacing};
use crate::schedulers::SchedulerKind;

/// What to paint and how. Field names are the command line's flags; see each field for units and defaults.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Request {
    /// What to paint.
    pub prompt: String,
    /// What the second text encoder reads instead of `prompt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_2: Option<String>,
    /// What not to paint. Absent and empty differ: absent means zeros where the model was trained so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// What the second text encoder reads instead of `negative`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_2: Option<String>,
    /// Name of the model in the catalogue; may be absent when the catalogue has one base model only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The catalogue: a path, or `built-in`; absent means the one that is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<PathBuf>,
    /// Picture width, px, a multiple of 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Picture height, px, a multiple of 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub height: Option<usize>,
    /// Denoising steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Guidance scale; at most 1 turns guidance, and with it the negative prompt, off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// Share of the guided output whose contrast is brought back to the unguided one's, `0.0..=1.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_rescale: Option<f64>,
    /// Whether the two halves of guidance run as one batch or one after the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_runs: Option<GuidanceRuns>,
    /// Update rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<SchedulerKind>,
    /// How timesteps are spread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spacing: Option<Spacing>,
    /// Curve of the noise levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigmas: Option<SigmaCurve>,
    /// Which levels a Karras, exponential or beta curve joins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma_range: Option<SigmaRange>,
    /// The noise levels themselves, falling: before each step and after the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigmas_list: Option<Vec<f64>>,
    /// The timesteps themselves, falling, one a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timesteps_list: Option<Vec<f64>>,
    /// The noise level that the run ends at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_sigma: Option<FinalSigma>,
    /// Whether a multistep solver ends with lower orders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lower_order_final: Option<bool>,
    /// Order of a multistep solver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solver_order: Option<usize>,
    /// Share of fresh noise, `0.0..=1.0`, where the scheduler leaves the choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    /// Whether the highest training timestep holds no signal at all, whatever the model says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_snr: Option<bool>,
    /// Whether the mistakes of diffusers' schedulers are repeated that are put right by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diffusers_quirks: Option<bool>,
    /// Seed of the noise; drawn when absent. torch's CPU generator uses its low 32 bits only, and so does this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Pictures in one run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Model that takes over for the last steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refiner: Option<String>,
    /// Share of the schedule that the base paints before the refiner takes over, `0.0..1.0`, exclusive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refine_at: Option<f64>,
    /// Size of the picture the subject was "photographed" at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_size: Option<Size>,
    /// Where the picture was "cropped".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<Corner>,
    /// Size the picture was "made for".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_size: Option<Size>,
    /// `original-size` of the negative branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_original_size: Option<Size>,
    /// `crop` of the negative branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_crop: Option<Corner>,
    /// `target-size` of the negative branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_target_size: Option<Size>,
    /// How beautiful the refiner believes the picture to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aesthetic_score: Option<f64>,
    /// `aesthetic-score` of the negative branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative_aesthetic_score: Option<f64>,
    /// Whether the VAE decodes in overlapping tiles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_tiling: Option<VaeTiling>,
    /// Where ONNX Runtime computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// What is traded between memory and speed; absent means what the machine's free memory allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMode>,
    /// Where the picture goes; several get `-0`, `-1`, … before the extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,
    /// Where latents are saved: at `stop-at`, else the final ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latents_out: Option<PathBuf>,
    /// Latents to go on from. Their own request rules; fields given beside it replace that request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latents_in: Option<PathBuf>,
    /// Step after which the run stops and saves its latents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_at: Option<StopAt>,
    /// ONNX Runtime's library or its folder; absent means the one that is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ort_lib: Option<PathBuf>,
    /// Threads inside an operator; absent means one a physical core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Whether the command line prints its result as JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<bool>,
}

/// How the two halves of classifier-free guidance run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidanceRuns {
    /// Negative and positive in one batch: one run of the UNet a step.
    #[default]
    Batch,
    /// One after the other: half the activation memory.
    Split,
}

/// Whether the VAE decodes in overlapping tiles: a word, or a tile's side in px.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VaeTiling {
    /// Above a size that would need several GiB at once.
    #[default]
    Auto,
    /// Whenever the picture is larger than one tile of the VAE's native size.
    On,
    /// Never.
    Off,
    /// Whenever the picture is larger than one tile with sides of this many px.
    Tile(usize),
}

/// A size in px, written `WIDTHxHEIGHT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Width, px.
    pub width: usize,
    /// Height, px.
    pub height: usize,
}

/// A corner in px, written `TOP,LEFT`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Corner {
    /// Distance from the top, px.
    pub top: usize,
    /// Distance from the left, px.
    pub left: usize,
}

/// Where a run stops early: a number of steps, or `handoff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopAt {
    /// After this many steps.
    Step(usize),
    /// Where the refiner would take over.
    Handoff,
}

impl Request {
    /// Reads a request from JSON.
    ///
    /// # Errors
    /// [`Error::Input`] with line, column and the unknown or ill-typed field.
    pub fn from_json(text: &str, origin: &std::path::Path) -> Result<Self> {
        serde_json::from_str(text).map_err(|e| Error::Input {
            path: origin.to_owned(),
            reason: e.to_string(),
        })
    }

    /// This request with the fields that `over` has in place of its own. An empty prompt counts as absent.
    #[must_use]
    pub fn overridden_by(&self, over: &Self) -> Self {
        fn pick<T: Clone>(over: Option<&T>, own: Option<&T>) -> Option<T> {
            over.or(own).cloned()
        }
        let prompt = if over.prompt.is_empty() {
            &self.prompt
        } else {
            &over.prompt
        };
        Self {
            prompt: prompt.clone(),
            prompt_2: pick(over.prompt_2.as_ref(), self.prompt_2.as_ref()),
            negative: pick(over.negative.as_ref(), self.negative.as_ref()),
            negative_2: pick(over.negative_2.as_ref(), self.negative_2.as_ref()),
            model: pick(over.model.as_ref(), self.model.as_ref()),
            models: pick(over.models.as_ref(), self.models.as_ref()),
            width: pick(over.width.as_ref(), self.width.as_ref()),
            height: pick(over.height.as_ref(), self.height.as_ref()),
            steps: pick(over.steps.as_ref(), self.steps.as_ref()),
            guidance: pick(over.guidance.as_ref(), self.guidance.as_ref()),
            guidance_rescale: pick(
                over.guidance_rescale.as_ref(),
                self.guidance_rescale.as_ref(),
            ),
            guidance_runs: pick(over.guidance_runs.as_ref(), self.guidance_runs.as_ref()),
            scheduler: pick(over.scheduler.as_ref(), self.scheduler.as_ref()),
            spacing: pick(over.spacing.as_ref(), self.spacing.as_ref()),
            sigmas: pick(over.sigmas.as_ref(), self.sigmas.as_ref()),
            sigma_range: pick(over.sigma_range.as_ref(), self.sigma_range.as_ref()),
            sigmas_list: pick(over.sigmas_list.as_ref(), self.sigmas_list.as_ref()),
            timesteps_list: pick(over.timesteps_list.as_ref(), self.timesteps_list.as_ref()),
            final_sigma: pick(over.final_sigma.as_ref(), self.final_sigma.as_ref()),
            lower_order_final: pick(over.lower_order_final.as_ref(), self.lower_order_final.as_ref()),
            solver_order: pick(over.solver_order.as_ref(), self.solver_order.as_ref()),
            eta: pick(over.eta.as_ref(), self.eta.as_ref()),
            zero_snr: pick(over.zero_snr.as_ref(), self.zero_snr.as_ref()),
            diffusers_quirks: pick(over.diffusers_quirks.as_ref(), self.diffusers_quirks.as_ref()),
            seed: pick(over.seed.as_ref(), self.seed.as_ref()),
            batch: pick(over.batch.as_ref(), self.batch.as_ref()),
            refiner: pick(over.refiner.as_ref(), self.refiner.as_ref()),
            refine_at: pick(over.refine_at.as_ref(), self.refine_at.as_ref()),
            original_size: pick(over.original_size.as_ref(), self.original_size.as_ref()),
            crop: pick(over.crop.as_ref(), self.crop.as_ref()),
            target_size: pick(over.target_size.as_ref(), self.target_size.as_ref()),
            negative_original_size: pick(
                over.negative_original_size.as_ref(),
                self.negative_original_size.as_ref(),
            ),
            negative_crop: pick(over.negative_crop.as_ref(), self.negative_crop.as_ref()),
            negative_target_size: pick(
                over.negative_target_size.as_ref(),
                self.negative_target_size.as_ref(),
            ),
            aesthetic_score: pick(over.aesthetic_score.as_ref(), self.aesthetic_score.as_ref()),
            negative_aesthetic_score: pick(
                over.negative_aesthetic_score.as_ref(),
                self.negative_aesthetic_score.as_ref(),
            ),
            vae_tiling: pick(over.vae_tiling.as_ref(), self.vae_tiling.as_ref()),
            provider: pick(over.provider.as_ref(), self.provider.as_ref()),
            memory: pick(over.memory.as_ref(), self.memory.as_ref()),
            output: pick(over.output.as_ref(), self.output.as_ref()),
            latents_out: pick(over.latents_out.as_ref(), self.latents_out.as_ref()),
            latents_in: pick(over.latents_in.as_ref(), self.latents_in.as_ref()),
            stop_at: pick(over.stop_at.as_ref(), self.stop_at.as_ref()),
            ort_lib: pick(over.ort_lib.as_ref(), self.ort_lib.as_ref()),
            threads: pick(over.threads.as_ref(), self.threads.as_ref()),
            json: pick(over.json.as_ref(), self.json.as_ref()),
        }
    }

    /// The part that decides the picture, without where it goes, where the run starts and stops, and with how many hands.
    #[must_use]
    pub fn without_places(&self) -> Self {
        Self {
            output: None,
            latents_out: None,
            latents_in: None,
            stop_at: None,
            ort_lib: None,
            threads: None,
            json: None,
            ..self.clone()
        }
    }
}
