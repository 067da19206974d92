//! The flags of `lora zip`.

// The doc comments here are the help texts, in which backticks would show.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;

use clap::Args;

use super::CatalogueArgs;
use crate::memory::MemoryMode;
use crate::provider::Provider;

/// Merge a content and a style LoRA into one that disturbs neither (ZipLoRA, arXiv:2311.13600).
///
/// Attention layers of the UNet (to_q, to_k, to_v, to_out) that both LoRAs change are merged column by column, each column
/// with a merger of its own, so that the result does with the content's prompt what the content LoRA does, and with the
/// style's prompt what the style LoRA does. All other layers of either, those of the text encoders too, are added up. No
/// pictures are needed: each LoRA paints some from its prompt, and what its layers see decides. The result is an ordinary
/// LoRA for --lora. Only low-rank LoRAs can be merged: DoRA, LoHa, LoKr and full differences are refused.
///
/// The mergers are worked out layer by layer, without gradients. `python -m export zip` learns them with gradients, as
/// published; its mergers, and what ziplora-pytorch saves, are taken with --mergers.
#[derive(Debug, Args)]
pub(in crate::cli) struct LoraZipArgs {
    /// The content LoRA: a name of the catalogue's loras, or a .safetensors file
    #[arg(long, value_name = "FILE")]
    pub content: String,
    /// The style LoRA
    #[arg(long, value_name = "FILE")]
    pub style: String,
    /// A prompt that calls what the content LoRA was trained to
    #[arg(long, value_name = "TEXT", required_unless_present = "mergers")]
    pub prompt_content: Option<String>,
    /// A prompt that calls what the style LoRA was trained to
    #[arg(long, value_name = "TEXT", required_unless_present = "mergers")]
    pub prompt_style: Option<String>,
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Where the merged LoRA goes
    #[arg(long, short, value_name = "FILE.safetensors")]
    pub output: PathBuf,
    /// Take the mergers of this file: one of --save-mergers, or what ziplora-pytorch saves
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ridge", "similarity", "save_mergers"])]
    pub mergers: Option<PathBuf>,
    /// Write the mergers to this file too
    #[arg(long, value_name = "FILE.safetensors")]
    pub save_mergers: Option<PathBuf>,
    /// How strongly mergers are drawn to 1, which is plain addition; more than 0 [default: 0.01]
    #[arg(long, value_name = "WEIGHT")]
    pub ridge: Option<f64>,
    /// How strongly the two mergers of a column are drawn away from each other [default: 0.01]
    #[arg(long, value_name = "WEIGHT")]
    pub similarity: Option<f64>,
    /// Say how much of its effect each LoRA loses, and would lose by addition, with pictures of the next seed. Takes more
    /// than twice as long
    #[arg(long)]
    pub measure: bool,
    /// Steps of the pictures [default: the model's]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance of the pictures [default: the model's]
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Width of the pictures, px [default: the model's]
    #[arg(long, value_name = "PX")]
    pub width: Option<usize>,
    /// Height of the pictures, px [default: the model's]
    #[arg(long, value_name = "PX")]
    pub height: Option<usize>,
    /// Pictures that each LoRA paints [default: 1]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Seed of the pictures [default: 0]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Where to compute: cpu, cuda, trt, coreml
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub provider: Provider,
    /// Memory against speed: low, balanced, fast [default: what the free memory allows]
    #[arg(long, value_name = "MODE")]
    pub memory: Option<MemoryMode>,
    /// Threads inside an operator [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}
