//! The catalogue `models.yaml`: every model the engine knows, its files and its constants.
//!
//! Constants of a model live here and nowhere in the code; `python -m export` writes the entries from the checkpoints'
//! own configs. Unknown keys are errors, so that a misspelt constant is never silently a default.

mod adapter;
mod catalogue;
mod check;
mod given;
mod lora;
mod variant;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use adapter::{Adapter, AdapterForm, AdapterKind, PixelRule, Side};
pub use catalogue::Catalogue;
pub use lora::{DefaultsOver, LoraEntry};
use serde::Deserialize;

use crate::provider::Dialect;
use crate::schedule::SchedulerConfig;
use crate::schedulers::SchedulerKind;

/// The keys of the weights that a whole model in one file may hold.
pub const CHECKPOINT: [&str; 4] = ["text_encoder", "text_encoder_2", "unet", "vae"];

/// One model: the files of its components and the constants of its configs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The model of which this one is a variant.
    #[serde(skip)]
    pub like: Option<String>,
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
    #[serde(default)]
    pub weights: BTreeMap<String, Vec<FileRef>>,
    /// A whole model in one file, in the original layout: it holds those of [`CHECKPOINT`] that are not under `weights`.
    #[serde(default)]
    pub checkpoint: Option<FileRef>,
    /// Graphs by component.
    pub graphs: BTreeMap<String, GraphEntry>,
    /// Image prompts that it understands, by the name that a request calls them.
    #[serde(default)]
    pub adapters: BTreeMap<String, Adapter>,
    /// What its image encoders want of a picture, by their names in [`Model::graphs`].
    #[serde(default)]
    pub image_encoders: BTreeMap<String, PixelRule>,
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
    /// Steps that a model was distilled for: it paints well in just these, at the timesteps of its own spacing, without
    /// guidance. `None` for one that takes any number.
    #[serde(default)]
    pub distilled_steps: Option<usize>,
}

/// Which conditioning a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Stable Diffusion XL and its refiner.
    Sdxl,
}

impl Family {
    /// The family's name in the catalogue.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sdxl => "sdxl",
        }
    }
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
    /// A path that a request named; relative ones start at the working directory.
    #[serde(skip)]
    Given(PathBuf),
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
#[derive(Debug, Clone, PartialEq, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Deserialize)]
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
    /// Its modules with cross-attention in the order down, up, mid, which is that of the layers within each width; empty
    /// where the entry was exported without image prompts.
    #[serde(default)]
    pub attentions: Vec<Attention>,
}

/// A module of a UNet with cross-attention: one entry of diffusers' `block.attentions`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Its name in diffusers, such as `down_blocks.1.attentions.0`.
    pub name: String,
    /// Width of its layers.
    pub width: usize,
    /// Cross-attention layers in it.
    pub layers: usize,
    /// How many latents along a side its level makes one of.
    pub factor: usize,
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
#[derive(Debug, Clone, PartialEq, Deserialize)]
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

    /// Whether weights are those of an adapter or an image encoder, which only image prompts need.
    fn is_extra(&self, key: &str) -> bool {
        self.adapters.contains_key(key) || self.image_encoders.contains_key(key)
    }

    /// Whether weights lie in a whole model's file.
    pub fn is_in_checkpoint(&self, key: &str) -> bool {
        self.checkpoint.is_some() && !self.weights.contains_key(key) && CHECKPOINT.contains(&key)
    }

    /// The files of some weights: their own, or the whole model's; none where the entry has no such weights.
    pub fn weight_files(&self, key: &str) -> &[FileRef] {
        match &self.checkpoint {
            Some(whole) if self.is_in_checkpoint(key) => std::slice::from_ref(whole),
            _ => self.weights.get(key).map_or(&[], Vec::as_slice),
        }
    }

    /// The same model with the weights of a whole model's file.
    #[must_use]
    pub fn with_checkpoint(mut self, file: FileRef) -> Self {
        let parts = |key: &str| CHECKPOINT.contains(&key);
        self.weights.retain(|key, _| !parts(key));
        self.checkpoint = Some(file);
        self
    }

    /// The graphs of the model itself, whose weights are no adapter's or image encoder's.
    pub fn own_graphs(&self) -> impl Iterator<Item = (&str, &GraphEntry)> {
        let graphs = self
            .graphs
            .iter()
            .map(|(name, graph)| (name.as_str(), graph));
        graphs.filter(|(_, graph)| !self.is_extra(&graph.weights))
    }

    /// Files that every request needs.
    pub fn own_files(&self) -> impl Iterator<Item = &FileRef> {
        let weights = self.weights.iter().filter(|(key, _)| !self.is_extra(key));
        weights
            .flat_map(|(_, files)| files)
            .chain(&self.checkpoint)
            .chain(self.tokenizer_files())
    }

    /// Files of weights and tokenizers.
    pub fn files(&self) -> impl Iterator<Item = &FileRef> {
        self.weights
            .values()
            .flatten()
            .chain(&self.checkpoint)
            .chain(self.tokenizer_files())
    }

    fn tokenizer_files(&self) -> impl Iterator<Item = &FileRef> {
        self.text.iter().flat_map(|t| {
            let t = &t.tokenizer;
            [&t.vocab, &t.merges, &t.json].into_iter().flatten()
        })
    }

    /// Files of graphs, in every dialect.
    pub fn graph_files(&self) -> impl Iterator<Item = &Path> {
        self.graphs.values().flat_map(GraphEntry::files)
    }
}

impl GraphEntry {
    /// The graphs that there are.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
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
