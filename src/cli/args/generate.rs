//! The flags of `generate`: the request's fields under the same names.

// The doc comments here are the help texts, in which backticks would show.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;

use clap::Args;

use super::CatalogueArgs;
use crate::memory::MemoryMode;
use crate::noise::NoiseKind;
use crate::provider::Provider;
use crate::request::{
    Corner, GuidanceRuns, ImagePrompt, Interval, LongPrompts, LoraUse, PromptSyntax, Request,
    Seeds, Size, StopAt, VaeTiling,
};
use crate::schedule::{FinalSigma, SigmaCurve, SigmaRange, Spacing};
use crate::schedulers::SchedulerKind;

#[derive(Debug, Args)]
pub(in crate::cli) struct GenerateArgs {
    /// What to paint
    pub prompt: Option<String>,
    /// What the second text encoder reads instead of PROMPT
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt_2: Option<String>,
    /// What not to paint; left out, SDXL base gets zeros, which is not the same as ""
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub negative: Option<String>,
    /// What the second text encoder reads instead of --negative
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub negative_2: Option<String>,
    /// What brackets in prompts mean: nothing (plain), or weights and schedules as in AUTOMATIC1111's web UI (a1111):
    /// (a:1.3) [a] BREAK [a:b:0.4] [a|b] [default: plain]
    #[arg(long, value_name = "SYNTAX")]
    pub prompt_syntax: Option<PromptSyntax>,
    /// Prompts of more than 75 tokens: read in several chunks, or cut off as in diffusers (cut) [default: chunks]
    #[arg(long, value_name = "HOW")]
    pub long_prompts: Option<LongPrompts>,
    /// Pictures that an adapter shows to the UNet; may be given several times:
    /// NAME=FILE[,FILE…][@SCALE][@mask=FILE[,FILE…]][@steps=START,END][@negative=FILE][@crop=center|pad|stretch].
    /// SCALE: a number, one for each masked picture, style, layout, style+layout, or scales of blocks in JSON [default: 1].
    /// Adapters of faces take identities, .npy or .safetensors, for pictures; FaceID-PlusV2 [@face=FILE[,FILE…]],
    /// [@negative-face=FILE] and [@shortcut=SCALE] too. A file with @ or , in its name can be named in a request's JSON only
    #[arg(long = "image-prompt", value_name = "NAME=FILE…")]
    pub image_prompts: Option<Vec<ImagePrompt>>,
    /// A LoRA that changes the model; may be given several times: a name of the catalogue's loras, or a .safetensors file.
    /// SCALE: its strength, te=SCALE that for the text encoders [default: 1, and for the text encoders the same]. A file
    /// with @ or :te= in its name needs a scale after it
    #[arg(long = "lora", value_name = "FILE[@SCALE][:te=SCALE]")]
    pub loras: Option<Vec<LoraUse>>,
    /// Apply LoRAs as far as they fit, with a warning, instead of refusing modules that the model does not have
    #[arg(long)]
    pub lora_lenient: bool,
    /// Layers of the text encoders to leave out, as diffusers counts them: 0 is what the web UI calls 2 [default: 0]
    #[arg(long, value_name = "N")]
    pub clip_skip: Option<usize>,
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Picture width, px, a multiple of 8 [default: the model's]
    #[arg(long, value_name = "PX")]
    pub width: Option<usize>,
    /// Picture height, px, a multiple of 8 [default: the model's]
    #[arg(long, value_name = "PX")]
    pub height: Option<usize>,
    /// Denoising steps [default: the model's]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance scale; at most 1 turns guidance and the negative prompt off [default: the model's]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// Guidance scales from the first step to the last, one a step or fewer, joined by straight lines, e.g. 9,3
    #[arg(
        long,
        value_name = "G,G,…",
        value_delimiter = ',',
        conflicts_with = "guidance",
        allow_negative_numbers = true
    )]
    pub guidance_list: Option<Vec<f64>>,
    /// Guidance only at noise levels above LOW up to HIGH, e.g. 0.3,5.4; a step without it costs half
    #[arg(long, value_name = "LOW,HIGH", allow_negative_numbers = true)]
    pub guidance_interval: Option<Interval>,
    /// Share of guidance's contrast to take back, 0 to 1 [default: 0]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub guidance_rescale: Option<f64>,
    /// Guidance in one `batch`, or `split` in two runs with half the memory [default: batch]
    #[arg(long, value_name = "HOW")]
    pub guidance_runs: Option<GuidanceRuns>,
    /// Update rule: euler, euler-ancestral, dpmpp-2m, unipc, …; `tronie schedulers` lists all [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<SchedulerKind>,
    /// Spread of the timesteps: leading, trailing, linspace [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub spacing: Option<Spacing>,
    /// Curve of the noise levels: normal, karras, exponential, beta, ays [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub sigmas: Option<SigmaCurve>,
    /// Levels that a curve joins: spacing (its first and last timestep), table (all of training) [default: the scheduler's]
    #[arg(long, value_name = "WHICH")]
    pub sigma_range: Option<SigmaRange>,
    /// The noise levels themselves, falling: before each step and after the last, e.g. 14.6,3.8,1.3,0.5,0
    #[arg(long, value_name = "S,S,…", value_delimiter = ',')]
    pub sigmas_list: Option<Vec<f64>>,
    /// The timesteps themselves, falling, one a step, e.g. 999,749,499,249
    #[arg(long, value_name = "T,T,…", value_delimiter = ',')]
    pub timesteps_list: Option<Vec<f64>>,
    /// Noise level that the run ends at: zero, sigma-min [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub final_sigma: Option<FinalSigma>,
    /// Whether a multistep solver ends with lower orders: true, false [default: the model's]
    #[arg(long, value_name = "BOOL")]
    pub lower_order_final: Option<bool>,
    /// Order of a multistep solver: 1, 2, 3, for sa-solver also 4 [default: the model's]
    #[arg(long, value_name = "N")]
    pub solver_order: Option<usize>,
    /// Share of fresh noise, 0 to 1: ddim [default: 0], tcd [default: 0.3]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub eta: Option<f64>,
    /// Whether the highest training timestep holds no signal: true, false [default: the model's]
    #[arg(long, value_name = "BOOL")]
    pub zero_snr: Option<bool>,
    /// Repeat the mistakes of diffusers that are put right by default; ARCHITECTURE.md lists them
    #[arg(long)]
    pub diffusers_quirks: bool,
    /// Seed of the noise, as in torch: one for all pictures, or one a picture: 7,8,9 [default: drawn, and written into the picture]
    #[arg(long, value_name = "N[,N…]")]
    pub seed: Option<Seeds>,
    /// Whose noise: torch's in f32 on the CPU (cpu), in f16 (cpu-f16), on CUDA (cuda) [default: cpu]
    #[arg(long, value_name = "KIND")]
    pub noise: Option<NoiseKind>,
    /// Pictures in one run [default: as many as seeds]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Model that paints the last steps
    #[arg(long, value_name = "NAME")]
    pub refiner: Option<String>,
    /// Share of the schedule before the refiner takes over [default: 0.8]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub refine_at: Option<f64>,
    /// Micro-conditioning: size the subject was photographed at [default: the picture's]
    #[arg(long, value_name = "WxH")]
    pub original_size: Option<Size>,
    /// Micro-conditioning: corner of the crop [default: 0,0]
    #[arg(long, value_name = "TOP,LEFT")]
    pub crop: Option<Corner>,
    /// Micro-conditioning: size the picture is made for [default: the picture's]
    #[arg(long, value_name = "WxH")]
    pub target_size: Option<Size>,
    /// --original-size of the negative branch
    #[arg(long, value_name = "WxH")]
    pub negative_original_size: Option<Size>,
    /// --crop of the negative branch
    #[arg(long, value_name = "TOP,LEFT")]
    pub negative_crop: Option<Corner>,
    /// --target-size of the negative branch
    #[arg(long, value_name = "WxH")]
    pub negative_target_size: Option<Size>,
    /// Aesthetic score for models that take one, the refiner [default: 6]
    #[arg(long, value_name = "SCORE", allow_negative_numbers = true)]
    pub aesthetic_score: Option<f64>,
    /// Aesthetic score of the negative branch [default: 2.5]
    #[arg(long, value_name = "SCORE", allow_negative_numbers = true)]
    pub negative_aesthetic_score: Option<f64>,
    /// VAE in tiles: auto (above 1536x1536), on, off, or a tile's side in px [default: auto; 512 with --memory low]
    #[arg(long, value_name = "WHEN|PX")]
    pub vae_tiling: Option<VaeTiling>,
    /// Where to compute: cpu, cuda, trt, coreml [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub provider: Option<Provider>,
    /// Memory against speed: low, balanced, fast [default: what the free memory allows]
    #[arg(long, value_name = "MODE")]
    pub memory: Option<MemoryMode>,
    /// The picture, a .png; several get -0, -1, … [default: out/MODEL-SEED.png]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Save latents: where the run stops, or the final ones beside the picture
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,
    /// Go on from saved latents; their request rules, flags replace its fields
    #[arg(long, value_name = "FILE")]
    pub latents_in: Option<PathBuf>,
    /// Stop after this many steps, or at the `handoff` to the refiner; needs --latents-out
    #[arg(long, value_name = "STEP")]
    pub stop_at: Option<StopAt>,
    /// Start from the request inside a picture or a JSON file; flags replace its fields
    #[arg(long, value_name = "PIC|FILE.json")]
    pub request: Option<PathBuf>,
    /// Print the result as JSON on stdout: request, files, seconds by stage, peak memory
    #[arg(long)]
    pub json: bool,
    /// Threads inside an operator [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

impl GenerateArgs {
    /// The flags as a request.
    pub fn to_request(&self) -> Request {
        Request {
            prompt: self.prompt.clone().unwrap_or_default(),
            prompt_2: self.prompt_2.clone(),
            negative: self.negative.clone(),
            negative_2: self.negative_2.clone(),
            prompt_syntax: self.prompt_syntax,
            long_prompts: self.long_prompts,
            image_prompts: self.image_prompts.clone(),
            loras: self.loras.clone(),
            lora_lenient: self.lora_lenient.then_some(true),
            clip_skip: self.clip_skip,
            model: self.model.clone(),
            models: self.catalogue.models.clone(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance: self.guidance,
            guidance_list: self.guidance_list.clone(),
            guidance_interval: self.guidance_interval,
            guidance_rescale: self.guidance_rescale,
            guidance_runs: self.guidance_runs,
            scheduler: self.scheduler,
            spacing: self.spacing,
            sigmas: self.sigmas,
            sigma_range: self.sigma_range,
            sigmas_list: self.sigmas_list.clone(),
            timesteps_list: self.timesteps_list.clone(),
            final_sigma: self.final_sigma,
            lower_order_final: self.lower_order_final,
            solver_order: self.solver_order,
            eta: self.eta,
            zero_snr: self.zero_snr,
            diffusers_quirks: self.diffusers_quirks.then_some(true),
            seed: self.seed.clone(),
            noise: self.noise,
            batch: self.batch,
            refiner: self.refiner.clone(),
            refine_at: self.refine_at,
            original_size: self.original_size,
            crop: self.crop,
            target_size: self.target_size,
            negative_original_size: self.negative_original_size,
            negative_crop: self.negative_crop,
            negative_target_size: self.negative_target_size,
            aesthetic_score: self.aesthetic_score,
            negative_aesthetic_score: self.negative_aesthetic_score,
            vae_tiling: self.vae_tiling,
            provider: self.provider,
            memory: self.memory,
            output: self.output.clone(),
            latents_out: self.latents_out.clone(),
            latents_in: self.latents_in.clone(),
            stop_at: self.stop_at,
            ort_lib: self.catalogue.ort_lib.clone(),
            threads: self.threads.map(usize::from),
            json: self.json.then_some(true),
        }
    }
}
