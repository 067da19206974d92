//! What a file of weights is, told by the names and shapes of its tensors.
//!
//! Python twin: diffusers' `infer_diffusers_model_type`, and `ComfyUI`'s `model_detection.py` for what a checkpoint says of
//! its training.

use super::fault;
use crate::error::Result;
use crate::manifest::Model;
use crate::schedule::Prediction;
use crate::weights::Weights;

/// What a file is by a part of a name, what that is called, and what to do. The first that is found counts.
const KINDS: &[(Part, &str, &str)] = &[
    (Has("lora_unet_"), LORA, GIVE_LORA),
    (Has("lora_te"), LORA, GIVE_LORA),
    (Has(".lora_A."), LORA, GIVE_LORA),
    (Has(".lora_B."), LORA, GIVE_LORA),
    (Has("lora_down."), LORA, GIVE_LORA),
    (Has(".lora.down"), LORA, GIVE_LORA),
    (Has("lokr_w1"), LORA, GIVE_LORA),
    (Has("hada_w1"), LORA, GIVE_LORA),
    (
        Begins("ip_adapter."),
        "an IP-Adapter",
        "add it to a model with `python -m export adapter`",
    ),
    (
        Begins("image_proj."),
        "an IP-Adapter",
        "add it to a model with `python -m export adapter`",
    ),
    (Begins("control_model."), CONTROL, NOT_YET),
    (Begins("controlnet_cond_embedding."), CONTROL, NOT_YET),
    (
        Has("motion_modules."),
        "an AnimateDiff motion module",
        NOT_YET,
    ),
    (Begins("emb_params"), EMBEDDING, NOT_YET),
    (Begins("clip_g"), EMBEDDING, NOT_YET),
    (Has("double_blocks."), "a Flux model", OTHER),
    (Has("single_transformer_blocks."), "a Flux model", OTHER),
    (Has("joint_blocks."), "a Stable Diffusion 3 model", OTHER),
    (
        Begins("text_encoders."),
        "a Stable Diffusion 3 model",
        OTHER,
    ),
    (
        Begins("cond_stage_model.transformer."),
        "a Stable Diffusion 1 model",
        OTHER,
    ),
    (
        Begins("cond_stage_model.model."),
        "a Stable Diffusion 2 model",
        OTHER,
    ),
    (Begins("clip_txt_mapper."), "a Stable Cascade model", OTHER),
    (
        Begins("edm_vpred."),
        "a CosXL model, whose noise levels are continuous",
        NOT_YET,
    ),
];
const LORA: &str = "a LoRA";
const GIVE_LORA: &str = "give it with --lora FILE, beside a model";
const EMBEDDING: &str = "a textual inversion embedding";
const CONTROL: &str = "a ControlNet";
const NOT_YET: &str = "this version cannot use one";
const OTHER: &str = "only SDXL and its refiner can be run: choose a checkpoint of theirs";

/// Where a mark stands in a tensor's name.
#[derive(Clone, Copy)]
enum Part {
    Begins(&'static str),
    Has(&'static str),
}
use Part::{Begins, Has};

/// Components alone, by the beginnings of two of their names.
const ALONE: &[([&str; 2], &str, &str)] = &[
    (
        ["conv_in.", "down_blocks."],
        "a UNet alone, in the diffusers layout",
        "unet",
    ),
    (
        ["input_blocks.", "middle_block."],
        "a UNet alone, in the original layout",
        "",
    ),
    (
        ["encoder.down_blocks.", "decoder.up_blocks."],
        "a VAE alone, in the diffusers layout",
        "vae",
    ),
    (
        ["encoder.down.", "decoder.up."],
        "a VAE alone, in the original layout",
        "",
    ),
    (
        ["text_model.encoder.", "text_model.embeddings."],
        "a text encoder alone",
        "text_encoder",
    ),
    (
        ["transformer_blocks.", "pos_embed."],
        "a transformer, which is no model of SDXL's",
        "",
    ),
];

/// What to do with a component of a whole model.
const WHOLE: &str = "name a file that holds a whole model: UNet, text encoders and VAE";

/// What a checkpoint says of itself beside its weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    /// What its network predicts, if it says so.
    pub prediction: Option<Prediction>,
    /// Whether it was trained with a last noise level without any signal.
    pub zero_snr: bool,
    /// Whether its latents are normalised channel by channel, as Playground 2.5's are.
    pub normalised: bool,
}

impl Marks {
    /// What a whole model of SDXL's architecture says of itself.
    ///
    /// # Errors
    /// [`crate::Error::Weights`] if the file is something else.
    pub(super) fn of(file: &Weights) -> Result<Self> {
        check_kind(file)?;
        let says = |name: &str| file.shape(name).is_some();
        let metadata = file.metadata().get("modelspec.prediction_type");
        let prediction = match metadata.map(|text| text.to_ascii_lowercase()).as_deref() {
            _ if says("v_pred") => Some(Prediction::VPrediction),
            Some("v" | "v_prediction" | "v-prediction") => Some(Prediction::VPrediction),
            Some("epsilon" | "eps") => Some(Prediction::Epsilon),
            _ => None,
        };
        Ok(Self {
            prediction,
            zero_snr: says("ztsnr"),
            normalised: says("edm_mean"),
        })
    }

    /// Whether an entry's scheduler is configured for `prediction`.
    pub(super) fn agrees(self, model: &Model, prediction: Prediction) -> bool {
        let zero_snr = model.scheduler.flag("rescale_betas_zero_snr", false);
        let same = model
            .scheduler
            .prediction()
            .is_ok_and(|own| own == prediction);
        same && (!self.zero_snr || zero_snr.unwrap_or(false))
    }
}

/// Refuses what is no whole model of SDXL's architecture by its name.
fn check_kind(file: &Weights) -> Result<()> {
    let begins = |prefix: &str| file.names().any(|name| name.starts_with(prefix));
    for (part, what, remedy) in KINDS {
        let found = match part {
            Begins(prefix) => begins(prefix),
            Has(part) => file.names().any(|name| name.contains(part)),
        };
        if found {
            return Err(fault(file, format!("holds {what}: {remedy}")));
        }
    }
    if !begins("model.diffusion_model.") && !begins("conditioner.") {
        let alone = ALONE
            .iter()
            .find(|(marks, ..)| marks.iter().all(|m| begins(m)));
        return Err(fault(file, alone_reason(alone)));
    }
    let channels = file.shape("model.diffusion_model.input_blocks.0.0.weight");
    let what = match channels {
        Some([_, 9, ..]) => {
            "an inpainting model: its UNet takes 9 channels, a mask and a picture among them"
        }
        Some([_, 8, ..]) => {
            "a model that edits pictures (InstructPix2Pix): its UNet takes 8 channels"
        }
        _ => return check_types(file),
    };
    let remedy = "this version cannot use one: choose the text-to-image checkpoint";
    Err(fault(file, format!("holds {what}; {remedy}")))
}

fn alone_reason(alone: Option<&([&str; 2], &str, &str)>) -> String {
    match alone {
        None => format!("is no checkpoint that is known: {WHOLE}, in SDXL's original layout"),
        Some((_, what, "")) => format!("holds {what}: {WHOLE}"),
        Some((_, what, key)) => format!(
            "holds {what}: {WHOLE}, or name it in an entry of the catalogue that is `like:` a model, under \
             `weights: {{{key}: […]}}`"
        ),
    }
}

/// Refuses weights of 8 bits and fewer by their type, before a graph asks for them one by one.
fn check_types(file: &Weights) -> Result<()> {
    use crate::weights::Dtype::{BF16, F16, F32};
    for weights in file.components()?.values() {
        for (name, dtype) in weights.dtypes() {
            if !matches!(dtype, F32 | F16 | BF16) {
                let reason = format!(
                    "holds weights of the type {dtype}, such as `{name}`, and only F32, F16 and BF16 can be used: choose \
                     the checkpoint's f16, bf16 or f32 file"
                );
                return Err(fault(file, reason));
            }
        }
    }
    Ok(())
}
