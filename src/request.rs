//! A request: everything that decides the picture, in one type for the command line, JSON files and libraries.
//!
//! A field left out takes the model's default ([`Request::resolve`]). A resolved request, written into every picture,
//! makes that picture again bit for bit.

mod image_prompt;
mod image_scale;
mod lora;
mod resolve;
mod resolved;
mod values;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use image_prompt::ImagePrompt;
pub use image_scale::{BlockScales, ImageScale, NamedScale, Scales, SideScales};
pub use lora::{LoraSet, LoraUse};
pub use resolved::Resolved;
pub use values::{
    Corner, Crop, GuidanceRuns, Interval, LongPrompts, PromptSyntax, Seeds, Share, Size, StopAt,
    VaeTiling,
};

use crate::error::{Error, Result};
use crate::memory::MemoryMode;
use crate::noise::NoiseKind;
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
    /// Whether brackets in prompts mean something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_syntax: Option<PromptSyntax>,
    /// What becomes of prompts that are longer than an encoder's sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub long_prompts: Option<LongPrompts>,
    /// Pictures that the UNet sees beside the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_prompts: Option<Vec<ImagePrompt>>,
    /// LoRAs that change the model, in the order in which they are applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loras: Option<Vec<LoraUse>>,
    /// Whether LoRAs with modules that the model does not have are applied as far as they fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_lenient: Option<bool>,
    /// Layers of the text encoders that are left out beside the last one, which SDXL never reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<usize>,
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
    /// Guidance scales from the first step to the last, in place of `guidance`: one a step, or fewer, which are joined by
    /// straight lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_list: Option<Vec<f64>>,
    /// Noise levels at which there is guidance; at the others it is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<Interval>,
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
    /// Whether the mistakes of diffusers are repeated that are put right by default: those of schedulers, and that
    /// `clip-skip` leaves the negative prompt alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diffusers_quirks: Option<bool>,
    /// Seed of the noise; drawn when absent. torch's CPU generator uses its low 32 bits only, and so does this. One seed
    /// draws for all pictures of a batch, one after the other; several draw each for its own picture, which is then the
    /// one that this seed gives alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<Seeds>,
    /// Whose random numbers the noise is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<NoiseKind>,
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

/// A request whose fields are those of the second where it has them.
macro_rules! picked {
    ($of:ident, $over:ident; $($field:ident),+ $(,)?) => {
        Self {
            prompt: if $over.prompt.is_empty() { &$of.prompt } else { &$over.prompt }.clone(),
            $($field: $over.$field.as_ref().or($of.$field.as_ref()).cloned(),)+
        }
    };
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
    /// One of two fields that exclude each other replaces the other.
    #[must_use]
    pub fn overridden_by(&self, over: &Self) -> Self {
        let mut whole = self.each_overridden_by(over);
        if over.guidance_list.is_some() {
            whole.guidance = over.guidance;
        } else if over.guidance.is_some() {
            whole.guidance_list = None;
        }
        if over
            .seed
            .as_ref()
            .is_some_and(|seeds| seeds.all().len() > 1)
        {
            whole.batch = over.batch;
        }
        whole
    }

    fn each_overridden_by(&self, over: &Self) -> Self {
        // A field that is missing here does not compile.
        picked!(
            self,
            over;
            prompt_2,
            negative,
            negative_2,
            prompt_syntax,
            long_prompts,
            image_prompts,
            loras,
            lora_lenient,
            clip_skip,
            model,
            models,
            width,
            height,
            steps,
            guidance,
            guidance_list,
            guidance_interval,
            guidance_rescale,
            guidance_runs,
            scheduler,
            spacing,
            sigmas,
            sigma_range,
            sigmas_list,
            timesteps_list,
            final_sigma,
            lower_order_final,
            solver_order,
            eta,
            zero_snr,
            diffusers_quirks,
            seed,
            noise,
            batch,
            refiner,
            refine_at,
            original_size,
            crop,
            target_size,
            negative_original_size,
            negative_crop,
            negative_target_size,
            aesthetic_score,
            negative_aesthetic_score,
            vae_tiling,
            provider,
            output,
            latents_out,
            latents_in,
            stop_at,
            ort_lib,
            threads,
            json,
            memory,
        )
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
