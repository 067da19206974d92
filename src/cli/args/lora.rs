//! The flags of `lora`.

// The doc comments here are the help texts, in which backticks would show.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::CatalogueArgs;
use super::zip::LoraZipArgs;
use crate::pipeline::OverlayType;
use crate::request::LoraUse;

/// Say what a LoRA changes in a model: which modules, how much of the network, by how much, and what it was trained to.
///
/// A file called merge or zip is named ./merge or ./zip.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(in crate::cli) struct LoraArgs {
    #[command(subcommand)]
    pub command: Option<LoraCommand>,
    #[command(flatten)]
    pub show: LoraShowArgs,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum LoraCommand {
    /// Merge LoRAs into an overlay: a file of the tensors that they change, which --lora uses without work and memory.
    Merge(LoraMergeArgs),
    Zip(Box<LoraZipArgs>),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct LoraShowArgs {
    /// The LoRA: a name of the catalogue's loras, or a .safetensors file
    #[arg(required = true, value_name = "FILE")]
    pub lora: Option<String>,
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Print the result as JSON on stdout, tensor by tensor
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct LoraMergeArgs {
    /// A LoRA, as for generate; may be given several times
    #[arg(long = "lora", value_name = "FILE[@SCALE][:te=SCALE]", required = true)]
    pub loras: Vec<LoraUse>,
    /// Apply LoRAs as far as they fit, with a warning, instead of refusing modules that the model does not have
    #[arg(long)]
    pub lora_lenient: bool,
    /// Model, a name of the catalogue [default: the only base model there, or whose files are here]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub catalogue: CatalogueArgs,
    /// Type of the values: f32, which the processor uses where it lies, or f16, half as large
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: OverlayType,
    /// Where it goes
    #[arg(long, short, value_name = "FILE.safetensors")]
    pub output: PathBuf,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}
