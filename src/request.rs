//! A request: everything that decides the picture, in one type for the command line, JSON files and libraries.
//!
//! A field left out takes the model's default ([`Request::resolve`]). A resolved request, written into every picture,
//! makes that picture again bit for bit.

mod resolve;
mod text_forms;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use resolve::Resolved;

use crate::error::{Error, Result};
use crate::provider::Provider;
use crate::schedule::{SigmaCurve, Spacing};
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
    /// Name of the model in the catalogue; may be absent when the catalogue has one base model only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The catalogue; absent means the one that is found.
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
    /// Seed of the noise; drawn when absent. torch's CPU generator uses its low 32 bits only, and so does this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
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
}

/// How the two halves of classifier-free guidance run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidanceRuns {
    /// Negative and positive in one batch: one run of the UNet a step.
    #[default]
    Batch,
    /// One after the other: half the activation memory.
    Split,
}

/// Whether the VAE decodes in overlapping tiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VaeTiling {
    /// Above a size that would need several GiB at once.
    #[default]
    Auto,
    /// Whenever the picture is larger than one tile.
    On,
    /// Never.
    Off,
}

/// A size in px, written `WIDTHxHEIGHT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Width, px.
    pub width: usize,
    /// Height, px.
    pub height: usize,
}

/// A corner in px, written `TOP,LEFT`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Corner {
    /// Distance from the top, px.
    pub top: usize,
    /// Distance from the left, px.
    pub left: usize,
}

/// Where a run stops early: a number of steps, or `handoff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopAt {
    /// After this many steps.
    Step(usize),
    /// Where the refiner would take over.
    Handoff,
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

    /// Puts the fields that `over` has in place of this request's.
    ///
    /// # Errors
    /// [`Error::Request`] if either cannot be represented as JSON, which well-formed requests always can.
    pub fn overridden_by(&self, over: &Self) -> Result<Self> {
        let json = |r: &Self| {
            serde_json::to_value(r).map_err(|e| Error::request("request", e.to_string()))
        };
        let (mut base, over_json) = (json(self)?, json(over)?);
        if let (Some(base), serde_json::Value::Object(over_fields)) =
            (base.as_object_mut(), over_json)
        {
            for (field, value) in over_fields {
                if field != "prompt" || !over.prompt.is_empty() {
                    base.insert(field, value);
                }
            }
        }
        serde_json::from_value(base).map_err(|e| Error::request("request", e.to_string()))
    }

    /// The part that decides the picture, without where it goes and where the run starts and stops.
    #[must_use]
    pub fn without_places(&self) -> Self {
        Self {
            output: None,
            latents_out: None,
            latents_in: None,
            stop_at: None,
            ..self.clone()
        }
    }
}
