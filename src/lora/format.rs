//! What a file is, told by its tensors' names: which format of LoRA, or which other thing that people take for one.
//!
//! Python twin: `_convert_non_diffusers_lora_to_diffusers`' guesses in diffusers, and `infer_diffusers_model_type`.

use std::collections::BTreeMap;
use std::fmt;

use super::keys::{Key, Role};
use crate::error::quoted;
use crate::weights::Weights;

/// Whose names a file's tensors have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// `lora_unet_….lora_down.weight`: kohya's sd-scripts and most sharing sites.
    Kohya,
    /// `unet.….lora_A.weight`: PEFT, and diffusers today.
    Peft,
    /// `unet.….processor.to_k_lora.down.weight` or `….lora_linear_layer.…`: diffusers before it used PEFT.
    DiffusersOld,
    /// LyCORIS's other forms: LoHa, LoKr, full differences.
    Lycoris,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kohya => "kohya",
            Self::Peft => "PEFT",
            Self::DiffusersOld => "diffusers (old)",
            Self::Lycoris => "LyCORIS",
        })
    }
}

/// Things that have tensors of such names, for files without one of a LoRA: a part of a name, and what it tells.
const NOT_LORA: &[(&str, &str)] = &[
    ("lora_controlnet", "a control-LoRA, which is a ControlNet"),
    (
        "model.diffusion_model.",
        "a whole model in one file: give it as the model",
    ),
    (
        "conditioner.embedders.",
        "a whole model in one file: give it as the model",
    ),
    (
        "first_stage_model.",
        "a whole model in one file: give it as the model",
    ),
    ("controlnet_", "a ControlNet"),
    ("control_model.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    (
        "id_encoder.",
        "an adapter for identities, such as PhotoMaker or PuLID",
    ),
    (
        "id_adapter.",
        "an adapter for identities, such as PhotoMaker or PuLID",
    ),
    (
        "single_transformer_blocks.",
        "a transformer's weights, of Flux or a model of its kind",
    ),
    (
        "double_blocks.",
        "a transformer's weights, of Flux or a model of its kind",
    ),
    (
        "joint_blocks.",
        "a transformer's weights, of Stable Diffusion 3",
    ),
    (
        "down_blocks.0.resnets.",
        "a UNet's own weights: give them with a model",
    ),
    (
        "input_blocks.",
        "a UNet's own weights: give them with a model",
    ),
    ("decoder.up", "a VAE"),
    ("quant_conv", "a VAE"),
    (
        "encoder.layers.",
        "a text encoder's own weights: give them with a model",
    ),
    (
        "emb_params",
        "a textual inversion, which is an embedding of words",
    ),
    (
        "string_to_param",
        "a textual inversion, which is an embedding of words",
    ),
    (
        "clip_g",
        "a textual inversion, which is an embedding of words",
    ),
    (
        "clip_l",
        "a textual inversion, which is an embedding of words",
    ),
];

/// Parts of modules' names that SDXL does not have, with dots for underscores.
const OTHER_FAMILIES: &[(&str, &str)] = &[
    ("double.blocks.", "Flux or a model of its kind"),
    ("single.blocks.", "Flux or a model of its kind"),
    ("single.transformer.blocks.", "Flux or a model of its kind"),
    ("joint.blocks.", "Stable Diffusion 3"),
    ("context.block.", "Stable Diffusion 3"),
    ("text.encoder.3.", "Stable Diffusion 3 or Flux"),
    ("lora.te3.", "Stable Diffusion 3 or Flux"),
    ("lora.prior.", "Stable Cascade"),
    ("down.blocks.0.attentions.", STABLE_DIFFUSION),
    ("up.blocks.3.attentions.", STABLE_DIFFUSION),
    ("input.blocks.1.1.", STABLE_DIFFUSION),
    ("input.blocks.2.1.", STABLE_DIFFUSION),
    ("output.blocks.9.1.", STABLE_DIFFUSION),
    ("output.blocks.10.1.", STABLE_DIFFUSION),
    ("output.blocks.11.1.", STABLE_DIFFUSION),
];

/// Beginnings of modules' names, for what only the beginning tells.
const OTHER_BEGINNINGS: &[(&str, &str)] = &[
    (
        "transformer.",
        "a diffusion transformer, such as Flux or Stable Diffusion 3",
    ),
    (
        "lora_transformer_",
        "a diffusion transformer, such as Flux or Stable Diffusion 3",
    ),
    (
        "diffusion_model.blocks.",
        "a diffusion transformer, such as those of video models",
    ),
    (
        "lora_unet_blocks_",
        "a diffusion transformer, such as those of video models",
    ),
    ("lora_unet_layers_", "a diffusion transformer"),
    ("lora_te_", STABLE_DIFFUSION),
];

const STABLE_DIFFUSION: &str = "Stable Diffusion 1 or 2";

/// Words in the metadata that name the base model of training.
const OTHER_BASES: &[(&str, &[(&str, &str)])] = &[
    (
        "ss_base_model_version",
        &[
            ("sd_v1", "Stable Diffusion 1"),
            ("sd_v2", "Stable Diffusion 2"),
            ("sd3", "Stable Diffusion 3"),
            ("flux", "Flux"),
            ("lumina", "Lumina"),
            ("hunyuan", "Hunyuan"),
            ("anima", "Anima"),
        ],
    ),
    (
        "modelspec.architecture",
        &[
            ("stable-diffusion-v1", "Stable Diffusion 1"),
            ("stable-diffusion-v2", "Stable Diffusion 2"),
            ("stable-diffusion-3", "Stable Diffusion 3"),
            ("stable-diffusion-xl-v1-refiner", "the SDXL refiner"),
            ("flux", "Flux"),
            ("lumina", "Lumina"),
            ("hunyuan", "Hunyuan"),
            ("qwen", "Qwen-Image"),
        ],
    ),
];

/// A file's format. The error says what it is instead, without the path.
pub(super) fn recognise(file: &Weights) -> Result<Format, String> {
    if file.names().next().is_none() {
        return Err("holds no tensors: fetch the file again".into());
    }
    let image = |name: &str| name.starts_with("image_proj.") || name.starts_with("ip_adapter.");
    if file.names().any(image) {
        return Err(
            "holds an IP-Adapter, not a LoRA: give it as an adapter for reference pictures".into(),
        );
    }
    let keys: Vec<Key> = file.names().filter_map(Key::of).collect();
    let carrying = || keys.iter().filter(|key| key.role != Role::Alpha);
    let Some(format) = carrying().map(|key| key.format).max() else {
        return Err(not_a_lora(file));
    };
    let family = keys.iter().find_map(|key| family(&key.module));
    let told = family.map(|family| (family, "the names of its tensors"));
    match told.or_else(|| base(file.metadata())) {
        None => Ok(format),
        Some((family, source)) => Err(format!(
            "holds a LoRA for {family} ({source} tell), and only those for SDXL can be used: look for its version for SDXL"
        )),
    }
}

fn not_a_lora(file: &Weights) -> String {
    let what = NOT_LORA
        .iter()
        .find(|(part, _)| file.names().any(|name| name.contains(part)));
    match what {
        Some((_, what)) => format!("holds no LoRA; it is {what}"),
        None => format!(
            "holds no LoRA: none of its {} tensors has a name that one has; the first is {}",
            file.names().count(),
            file.names().next().map(quoted).unwrap_or_default()
        ),
    }
}

fn family(module: &str) -> Option<&'static str> {
    let begins = OTHER_BEGINNINGS
        .iter()
        .find(|(start, _)| module.starts_with(start));
    if let Some((_, family)) = begins {
        return Some(family);
    }
    let dotted = module.replace('_', ".") + ".";
    let found = OTHER_FAMILIES.iter().find(|(part, _)| {
        dotted
            .match_indices(part)
            .any(|(at, _)| at == 0 || dotted[..at].ends_with('.'))
    });
    found.map(|(_, family)| *family)
}

fn base(metadata: &BTreeMap<String, String>) -> Option<(&'static str, &'static str)> {
    OTHER_BASES.iter().find_map(|(key, words)| {
        let value = metadata.get(*key)?.to_ascii_lowercase();
        let found = words.iter().find(|(word, _)| value.starts_with(word));
        found.map(|(_, family)| (*family, "its metadata"))
    })
}
