//! The catalogue `models.yaml`: every model the engine knows, its files and its constants.
//!
//! Constants of a model live here and nowhere in the code; `python -m export` writes the entries from the checkpoints'
//! own configs. Unknown keys are errors, so that a misspelt constant is never silently a default.

mod catalogue;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

pub use catalogue::Catalogue;
use serde::Deserialize;

use crate::provider::Dialect;
use crate::schedule::SchedulerConfig;
use crate::schedulers::SchedulerKind;

/// Longest token sequence; CLIP's is 77.
const MAX_TOKENS: usize = 4096;
/// Most channels of latents, and most pixels along a latent's side.
const MAX_LATENT: usize = 256;

/// One model: the files of its components and the constants of its configs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Which conditioning it takes.
    pub family: Family,
    /// Its part in a generation.
    pub role: Role,
    /// Hub id or folder it was exported from.
    pub origin: String,
    /// Licence of the weights, if known.
    #[serde(default)]
    pub licence: Option<String>,
    /// Weight files by component; several are shards.
    pub weights: BTreeMap<String, Vec<FileRef>>,
    /// Graphs by component.
    pub graphs: BTreeMap<String, GraphEntry>,
    /// Text encoders in the order in which their hidden states are joined.
    pub text: Vec<TextEntry>,
    /// Constants of the UNet.
    pub unet: UnetFacts,
    /// Constants of the VAE.
    pub vae: VaeFacts,
    /// Whether a missing negative prompt means zeros instead of the encoded empty text.
    pub force_zeros_for_empty_prompt: bool,
    /// Whether `time_ids` end in an aesthetic score instead of the target size.
    pub requires_aesthetics_score: bool,
    /// The checkpoint's `scheduler_config.json`.
    pub scheduler: SchedulerConfig,
    /// What a request gets that does not say otherwise.
    pub defaults: Defaults,
}

/// Which conditioning a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Stable Diffusion XL and its refiner.
    Sdxl,
}

/// A model's part in a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Starts from noise.
    Base,
    /// Continues another model's latents.
    Refiner,
}

/// A file: on this machine, or in a hub repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(untagged)]
pub enum FileRef {
    /// A path; relative ones start at the catalogue's folder.
    Path(PathBuf),
    /// A file in a hub repository.
    Hub(HubFile),
}

/// A file in a hub repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubFile {
    /// `owner/name`.
    pub repo: String,
    /// Path inside the repository.
    pub file: String,
    /// Branch, tag or commit; `main` when absent.
    #[serde(default)]
    pub revision: Option<String>,
}

/// A component's graph in each dialect, and whose weights it takes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphEntry {
    /// Key into [`Model::weights`].
    pub weights: String,
    /// Graph with fused operators for the processor.
    #[serde(default)]
    pub fused: Option<PathBuf>,
    /// Graph with fused operators for NVIDIA GPUs.
    #[serde(default)]
    pub cuda: Option<PathBuf>,
    /// Graph with standard operators.
    #[serde(default)]
    pub plain: Option<PathBuf>,
}

/// A text encoder and its tokenizer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextEntry {
    /// Key into [`Model::graphs`].
    pub encoder: String,
    /// Its tokenizer.
    pub tokenizer: TokenizerEntry,
    /// Whether its `text_embeds` are the pooled embedding for the UNet.
    pub pooled: bool,
}

/// A CLIP tokenizer: `vocab` and `merges`, or one `json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerEntry {
    /// `vocab.json`.
    #[serde(default)]
    pub vocab: Option<FileRef>,
    /// `merges.txt`.
    #[serde(default)]
    pub merges: Option<FileRef>,
    /// `tokenizer.json`.
    #[serde(default)]
    pub json: Option<FileRef>,
    /// Id of `<|startoftext|>`.
    pub bos: i64,
    /// Id of `<|endoftext|>`.
    pub eos: i64,
    /// Id that fills up to `length`.
    pub pad: i64,
    /// Tokens in one sequence, start and end included.
    pub length: usize,
}

/// Constants of a UNet.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnetFacts {
    /// Channels of `sample`.
    pub in_channels: usize,
    /// Native latent height and width.
    pub sample_size: usize,
    /// Length of a row of `time_ids`.
    pub time_ids: usize,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Width of the pooled embedding.
    pub pooled_dim: usize,
    /// Cross-attention layers by width.
    pub kv: BTreeMap<usize, usize>,
}

/// Constants of a VAE.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeFacts {
    /// Latents are divided by it before decoding.
    pub scaling_factor: f64,
    /// Must be `null`: SDXL's pipeline applies none.
    #[serde(default)]
    pub shift_factor: Option<f64>,
    /// Per-channel mean, where the checkpoint normalises channel by channel.
    #[serde(default)]
    pub latents_mean: Option<Vec<f64>>,
    /// Per-channel standard deviation.
    #[serde(default)]
    pub latents_std: Option<Vec<f64>>,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Pixels per latent along a side.
    pub scale: usize,
    /// Native picture height and width, px; tiles have this size.
    pub sample_size: usize,
    /// Whether the VAE overflows in f16.
    pub force_upcast: bool,
}

/// What a request gets that does not say otherwise.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Picture width, px.
    pub width: usize,
    /// Picture height, px.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Update rule, when the checkpoint's own is one that this engine has.
    #[serde(default)]
    pub scheduler: Option<SchedulerKind>,
}

impl Model {
    /// The graph of `component` in the dialect, if the entry has one.
    pub fn graph(&self, component: &str, dialect: Dialect) -> Option<&Path> {
        let entry = self.graphs.get(component)?;
        match dialect {
            Dialect::Fused => entry.fused.as_deref(),
            Dialect::Cuda => entry.cuda.as_deref(),
            Dialect::Plain => entry.plain.as_deref(),
        }
    }

    /// Files of weights and tokenizers.
    pub fn files(&self) -> impl Iterator<Item = &FileRef> {
        let tokenizers = self.text.iter().flat_map(|t| {
            let t = &t.tokenizer;
            [&t.vocab, &t.merges, &t.json].into_iter().flatten()
        });
        self.weights.values().flatten().chain(tokenizers)
    }

    /// Files of graphs, in every dialect.
    pub fn graph_files(&self) -> impl Iterator<Item = &Path> {
        self.graphs.values().flat_map(GraphEntry::files)
    }

    fn check(&self) -> Result<(), String> {
        for (component, graph) in &self.graphs {
            if !self.weights.contains_key(&graph.weights) {
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
        for required in ["kv", "unet", "vae_decoder"] {
            if !self.graphs.contains_key(required) {
                return Err(format!(
                    "graphs: `{required}` is missing; export the model again"
                ));
            }
        }
        self.check_text()?;
        self.vae.check()?;
        let positive = [
            ("unet.in_channels", self.unet.in_channels),
            ("unet.sample_size", self.unet.sample_size),
            ("defaults.width", self.defaults.width),
            ("defaults.height", self.defaults.height),
            ("defaults.steps", self.defaults.steps),
        ];
        positive
            .iter()
            .find(|(_, v)| *v == 0)
            .map_or(Ok(()), |(key, _)| Err(format!("{key}: must not be 0")))?;
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

impl GraphEntry {
    /// The graphs that there are.
    fn files(&self) -> impl Iterator<Item = &Path> {
        // By name, so that a new dialect cannot be forgotten here.
        let Self {
            weights: _,
            fused,
            cuda,
            plain,
        } = self;
        let files = [fused, cuda, plain].into_iter().flatten();
        files.map(PathBuf::as_path)
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
    fn check(&self) -> Result<(), String> {
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
