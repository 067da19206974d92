//! Flags.

// The doc comments here are the help texts, in which backticks would show.
#![allow(clippy::doc_markdown)]

mod generate;
mod lora;
mod zip;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(super) use generate::GenerateArgs;
pub(super) use lora::{LoraArgs, LoraCommand, LoraMergeArgs, LoraShowArgs};
pub(super) use zip::LoraZipArgs;

use crate::bench::quality::Subject;
use crate::memory::MemoryMode;
use crate::pipeline::Options;
use crate::provider::Provider;
use crate::request::{Crop, ImagePrompt, Size};

/// SDXL on ONNX Runtime: text and reference pictures to a picture, with base and refiner.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Paint a picture.
    Generate(Box<GenerateArgs>),
    /// Keep what an adapter's image encoder sees in a picture, for later runs without picture and encoder.
    Embed(EmbedArgs),
    /// Say what a LoRA changes in a model, or merge several into a file.
    Lora(Box<LoraArgs>),
    /// List the models of the catalogue and whether their files are here.
    Models(CatalogueArgs),
    /// List the schedulers, what each can do and what it costs, and draw their noise levels.
    Schedulers(SchedulersArgs),
    /// Paint the demo's sheet: a prompt alone, a style, a face, both, few steps, a LoRA.
    #[cfg(feature = "demo")]
    Demo(DemoArgs),
    /// Print the request inside a picture or a latents file.
    Inspect(InspectArgs),
    /// Say what is found, what works and what is missing.
    Doctor(CatalogueArgs),
    /// List or delete the weights that were expanded to f32.
    Cache(CacheArgs),
    /// Measure this machine: seconds by stage, memory, arithmetic rate, difference to the processor's picture.
    #[command(after_long_help = BENCH_JSON)]
    Bench(BenchArgs),
    /// Measure one configuration in this process; `bench` starts itself with this.
    #[command(hide = true)]
    BenchJob(BenchJobArgs),
}

/// List or delete the weights that were expanded to f32.
///
/// On the CPU, f16 and bf16 checkpoints are expanded once to a file that is mapped from then on. The folder is
/// $TRONIE_CACHE/weights, or tronie/weights in the system's folder for caches; TRONIE_CACHE=off has weights expanded in
/// memory at every start instead.
#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    #[command(subcommand)]
    pub command: Option<CacheCommand>,
    /// Print the result as JSON on stdout
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum CacheCommand {
    /// List what is there: size, last use, source files. The same as no command.
    List,
    /// Delete all of it, or the entries that are named. They are made again when they are needed.
    Clear(ClearArgs),
}

#[derive(Debug, Args)]
pub(super) struct ClearArgs {
    /// The beginning of a key, or a source file, as `tronie cache` lists them [default: all entries]
    #[arg(value_name = "ENTRY")]
    pub entries: Vec<String>,
    /// Only entries whose source files are gone or have changed
    #[arg(long, conflicts_with = "entries")]
    pub orphans: bool,
}

/// What `bench --json` prints.
const BENCH_JSON: &str = "\
Every configuration, a provider with a memory mode, runs in a process of its own: the request as often as --runs says, \
then one step and one decoding with ONNX Runtime's profiler, then a matrix product of SDXL's size, whose rate is the \
limit that shares refer to. The exit status is 0 if one configuration could be measured, otherwise that of the first.

JSON: version, library, request, runs, reference (provider, memory), rows. A row:
  provider, memory   the configuration
  reason             why it could not be measured, or null
  difference         to the picture of the reference, the first row on the processor, or null:
                     psnr-db (null for equal pictures), largest-level
  measured           null, or what follows
In measured:
  load-seconds       building all sessions, of the first run
  text-seconds       text encoders and projection, median
  total-seconds      the whole request, of the first run
  unets              model, first-step-seconds, step-seconds (median of the later steps, null if
                     there are none), samples (those), outside-runtime-share (of a step),
                     flops (of a step), flops-per-second, share-of-limit
  decoder            seconds (median), samples, flops, flops-per-second, share-of-limit
  limit-flops-per-second
                     of the matrix product: f32 on the processor, f16 elsewhere
  peak-anonymous-bytes, denoise-anonymous-bytes, peak-resident-bytes
                     of all runs; null where the system does not tell
  stages             of the first run: stage, what, seconds, anonymous-bytes-before,
                     anonymous-bytes-peak
  fallen-back        nodes on the processor where another provider was asked for:
                     network, operator, node
  operators          of the profiled run: network, operator, provider, runs, seconds, share, flops
With --times-only, flops, rates, shares and the limit are null, fallen-back and operators empty.

--quality FOLDER: the judge's table, or with --json: version, folder, model, seconds, measures. A measure:
  subject            text, identity, style, both, refiner, lightning, lora
  what               the attribute, or what the number is
  value, count       the number, and of how many pictures
  bar, met           {at-least: …} or {at-most: …} and whether it is reached, or null
The exit status is 0 when all could be measured, whatever bars were missed.";

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Model that paints the last steps
    #[arg(long, value_name = "NAME")]
    pub refiner: Option<String>,
    /// Share of the schedule before the refiner takes over [default: 0.5]
    #[arg(
        long,
        value_name = "SHARE",
        requires = "refiner",
        allow_negative_numbers = true
    )]
    pub refine_at: Option<f64>,
    /// Where to compute, several with commas: cpu, cuda, trt, coreml
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "cpu"
    )]
    pub provider: Vec<Provider>,
    /// Memory modes, several with commas: low, balanced, fast [default: on the processor all that fit, else balanced]
    #[arg(long, value_name = "MODE,…", value_delimiter = ',')]
    pub memory: Vec<MemoryMode>,
    /// Picture size, px, multiples of 8 [default: the model's]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// A picture that the UNet sees beside the text, as for `generate`
    #[arg(long = "image-prompt", value_name = "NAME=FILE…")]
    pub image_prompts: Option<Vec<ImagePrompt>>,
    /// Denoising steps [default: 4, and the model's with --quality]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance scale; at most 1 turns guidance off and halves the work [default: the model's]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// Threads inside an operator [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// How often the request runs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub runs: u16,
    /// Print the time of every kind of operator too
    #[arg(long, conflicts_with = "times_only")]
    pub operators: bool,
    /// Measure pictures instead of time: paint what FOLDER/quality.json asks and have FOLDER's judge look
    #[arg(
        long,
        value_name = "FOLDER",
        num_args = 0..=1,
        default_missing_value = "tests/quality",
        conflicts_with_all = ["refiner", "size", "image_prompts", "runs", "operators", "times_only"]
    )]
    pub quality: Option<PathBuf>,
    /// Only these: text, identity, style, both, refiner, lightning, lora, several with commas
    #[arg(
        long,
        value_name = "WHAT,…",
        value_delimiter = ',',
        requires = "quality"
    )]
    pub quality_only: Vec<Subject>,
    /// Only the first N questions of each kind
    #[arg(long, value_name = "N", requires = "quality", value_parser = at_least_one)]
    pub quality_count: Option<usize>,
    /// Leave out the profiled run and the limit: no work, rates, operators and fallen back nodes
    #[arg(long)]
    pub times_only: bool,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// A count that leaves something.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(count) => Ok(count),
        Err(_) => Err("is not a whole number".into()),
    }
}

#[derive(Debug, Args)]
pub(super) struct EmbedArgs {
    /// The picture
    pub picture: PathBuf,
    /// Adapter of the model, whose image encoder looks
    #[arg(long, value_name = "NAME")]
    pub adapter: String,
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// How the picture becomes square: center, pad, stretch [default: center]
    #[arg(long, value_name = "CROP")]
    pub crop: Option<Crop>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Where to compute: cpu, cuda, trt, coreml
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub provider: Provider,
    /// Memory mode: low, balanced, fast; the bits are those that `generate` computes in this mode
    #[arg(long, value_name = "MODE", default_value = "balanced")]
    pub memory: MemoryMode,
    /// Where it goes [default: the picture's name with .safetensors]
    #[arg(long, short, value_name = "FILE.safetensors")]
    pub output: Option<PathBuf>,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct BenchJobArgs {
    /// A folder with the job; the report and the picture go there
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CatalogueArgs {
    /// The catalogue, or `built-in` [default: $TRONIE_MODELS, ./models.yaml, models.yaml beside the executable, `built-in`]
    #[arg(long, value_name = "FILE")]
    pub models: Option<PathBuf>,
    /// ONNX Runtime's library or its folder [default: searched for, see the README]
    #[arg(long, value_name = "PATH")]
    pub ort_lib: Option<PathBuf>,
}

impl CatalogueArgs {
    /// What a pipeline is opened with: this catalogue and library, all else as by default.
    pub fn options(&self) -> Options {
        Options {
            models: self.models.clone(),
            ort_lib: self.ort_lib.clone(),
            ..Options::default()
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct SchedulersArgs {
    /// Draw the noise levels of every scheduler and curve into this PNG
    #[arg(long, value_name = "FILE.png")]
    pub draw: Option<PathBuf>,
    /// Steps to draw
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub steps: usize,
    /// Model whose training levels are drawn, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// The catalogue, or `built-in` [default: $TRONIE_MODELS, ./models.yaml, models.yaml beside the executable, `built-in`]
    #[arg(long, value_name = "FILE")]
    pub models: Option<PathBuf>,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Where the sheet goes
    #[arg(long, short, value_name = "FILE.png", default_value = "demo.png")]
    pub output: PathBuf,
    /// Where to compute: cpu, cuda, trt, coreml
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub provider: Provider,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A picture made by tronie, or a file of --latents-out
    pub file: PathBuf,
}
