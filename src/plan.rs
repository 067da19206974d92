//! A generation as data: one schedule cut into segments, each saying which network runs and what it is told.
//!
//! Tensor names that cross module borders are written here once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, Array4};

use crate::memory::MemoryMode;
use crate::request::{GuidanceRuns, LoraSet, Resolved};
use crate::schedule::{Prediction, Schedule};
use crate::schedulers::SchedulerKind;

/// Names of graph components and tensors, as `export/` writes them.
pub mod names {
    /// Component: UNet.
    pub const UNET: &str = "unet";
    /// Component: UNet that sees image prompts too.
    pub const UNET_IMAGE: &str = "unet_image";
    /// Component: projection of tokens to keys and values.
    pub const KV: &str = "kv";
    /// Component: VAE decoder.
    pub const VAE_DECODER: &str = "vae_decoder";
    /// Token ids `[batch, tokens]`.
    pub const INPUT_IDS: &str = "input_ids";
    /// Penultimate hidden states `[batch, tokens, width]`.
    pub const HIDDEN_STATES: &str = "hidden_states";
    /// Pooled embedding `[batch, width]`.
    pub const TEXT_EMBEDS: &str = "text_embeds";
    /// Text embeddings `[batch, tokens, width]`.
    pub const ENCODER_HIDDEN_STATES: &str = "encoder_hidden_states";
    /// Micro-conditioning `[batch, ids]`.
    pub const TIME_IDS: &str = "time_ids";
    /// Noisy latents `[batch, channels, height, width]`; also a picture for the VAE.
    pub const SAMPLE: &str = "sample";
    /// Timestep `[1]`.
    pub const TIMESTEP: &str = "timestep";
    /// The UNet's output `[batch, channels, height, width]`.
    pub const OUT_SAMPLE: &str = "out_sample";
    /// Latents for the decoder `[batch, channels, height, width]`.
    pub const LATENT_SAMPLE: &str = "latent_sample";

    /// Which tokens of image prompts are there and not padding, 1 or 0, `[sources, tokens]`.
    pub const IMAGE_VALID: &str = "image_valid";
    /// A preprocessed picture `[batch, 3, height, width]`.
    pub const PIXEL_VALUES: &str = "pixel_values";
    /// A picture's pooled embedding `[batch, width]`.
    pub const IMAGE_EMBEDS: &str = "image_embeds";
    /// A face's identity `[batch, width]`.
    pub const ID_EMBEDS: &str = "id_embeds";
    /// How much of what is seen of a face is added to what its identity says, `[1]`.
    pub const SHORTCUT_SCALE: &str = "shortcut_scale";
    /// A picture's tokens for cross-attention `[batch, tokens, context]`.
    pub const IP_HIDDEN_STATES: &str = "ip_hidden_states";

    /// Whether a component is a UNet, in whichever form.
    pub fn is_unet(component: &str) -> bool {
        [UNET, UNET_IMAGE].contains(&component)
    }

    /// Keys and values of the text for the layers of `width`, `[2 * layers, batch, tokens, width]`.
    pub fn text_kv(width: usize) -> String {
        format!("text_kv_{width}")
    }

    /// Keys and values of image prompts for the layers of `width`, `[2 * layers, batch, sources, tokens, width]`.
    pub fn image_kv(width: usize) -> String {
        format!("image_kv_{width}")
    }

    /// Weights of the places at which the layers of a downsampling factor look, `[sources, height * width]` of that level.
    pub fn image_area(factor: usize) -> String {
        format!("image_area_{factor}")
    }

    /// Component: an adapter's network from a picture's embedding to its tokens.
    pub fn projection(adapter: &str) -> String {
        format!("{adapter}.projection")
    }

    /// Component: an adapter's projection of tokens to keys and values.
    pub fn adapter_kv(adapter: &str) -> String {
        format!("{adapter}.kv")
    }
}

/// Keys and values of cross-attention by layer width: `[2 * layers, 1, tokens, width]`, keys at even, values at odd
/// places of the first axis.
pub type KeysValues = BTreeMap<usize, Array4<f32>>;

/// Where cross-attention looks beside the text: keys and values, constant over a segment.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSource {
    /// Keys, and values that carry the scale of their layer.
    pub kv: KeysValues,
    /// By downsampling factor the weight of every place `[height * width]` of that level; `None` is 1 everywhere.
    pub area: Option<Areas>,
}

/// By downsampling factor of the UNet's level, the weight of each of its places, row by row.
pub type Areas = BTreeMap<usize, Vec<f32>>;

/// Which form of its UNet a segment runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnetForm {
    /// It sees the text.
    Text,
    /// It sees image prompts too.
    Image {
        /// By downsampling factor, how many places the levels with cross-attention have.
        places: BTreeMap<usize, usize>,
    },
}

impl UnetForm {
    /// The component of the catalogue.
    pub const fn component(&self) -> &'static str {
        match self {
            Self::Text => names::UNET,
            Self::Image { .. } => names::UNET_IMAGE,
        }
    }
}

/// What one branch of guidance is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// Pooled text embedding `[1, width]`.
    pub text_embeds: Array2<f32>,
    /// Micro-conditioning `[1, ids]`.
    pub time_ids: Array2<f32>,
    /// Keys and values of the text.
    pub text: KeysValues,
    /// What cross-attention looks at beside the text; the other branch has as many.
    pub images: Vec<Arc<AttentionSource>>,
}

/// Classifier-free guidance.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// For every step of the schedule: `eps = eps_u + scale * (eps_c - eps_u)`; at most 1 means off.
    pub scales: Vec<f64>,
    /// Share of the output rescaled to the unguided contrast, `0.0..=1.0`.
    pub rescale: f64,
    /// One batch or two runs.
    pub runs: GuidanceRuns,
}

impl Guidance {
    /// The guidance that a request asks for on a schedule.
    pub fn of(request: &Resolved, schedule: &Schedule) -> Self {
        let inside = |sigma: f64| {
            let interval = request.request.guidance_interval;
            interval.is_none_or(|i| i.low < sigma && sigma <= i.high)
        };
        let steps = schedule.steps();
        let scale = |step: usize| request.guidance_at(step, steps);
        Self {
            scales: (0..steps)
                .map(|step| {
                    if inside(schedule.sigmas[step]) {
                        scale(step)
                    } else {
                        1.0
                    }
                })
                .collect(),
            rescale: request.guidance_rescale,
            runs: request.guidance_runs,
        }
    }

    /// Whether there is a negative branch at a step.
    pub fn is_on(&self, step: usize) -> bool {
        self.scales.get(step).is_some_and(|scale| *scale > 1.0)
    }
}

/// Consecutive steps with one network that is told the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Steps of the schedule.
    pub steps: Range<usize>,
    /// Where the update rule started afresh: the first step of this model, in this segment or one before it.
    pub since: usize,
    /// The catalogue's name of the model whose UNet runs.
    pub model: String,
    /// In which form.
    pub form: UnetForm,
    /// What that UNet predicts.
    pub prediction: Prediction,
    /// The prompt's branch, a place in [`Plan::branches`].
    pub positive: usize,
    /// The negative prompt's branch; `None` where guidance is off.
    pub negative: Option<usize>,
}

/// A whole generation, ready to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Timesteps and noise levels.
    pub schedule: Schedule,
    /// Update rule; it starts afresh with every model.
    pub scheduler: SchedulerKind,
    /// Guidance of every step.
    pub guidance: Guidance,
    /// How its networks are loaded.
    pub memory: MemoryMode,
    /// What changes the base model.
    pub loras: LoraSet,
    /// What segments are told; one that returns, as with prompts in turns, is here once.
    pub branches: Vec<Branch>,
    /// Segments in order; together they cover the steps that were asked for.
    pub segments: Vec<Segment>,
    /// Shape of the latents `[batch, channels, height, width]`.
    pub latents: [usize; 4],
}
