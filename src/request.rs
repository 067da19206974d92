//! A request: everything that decides the picture, in one type for the command line, JSON files and libraries.
//!
//! A field left out takes the model's default ([`Request::resolve`]). A resolved request, written into every picture,
//! makes that picture again bit for bit.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::manifest::{Catalogue, Model};
use crate::provider::Provider;
use crate::schedule::{SigmaCurve, Spacing};
use crate::schedulers::SchedulerKind;

/// SDXL's latents and its reference pipeline want picture sides that are multiples of this.
const SIDE_MULTIPLE: usize = 8;
/// Largest picture area, px: more is out of reach of a VAE even in tiles, and usually a slip of the keyboard.
const MAX_AREA: usize = 1 << 26;
/// Largest side, px.
const MAX_SIDE: usize = 16_384;
/// Most pictures in one run.
const MAX_BATCH: usize = 64;
/// Longest prompt, bytes.
const MAX_PROMPT: usize = 64 << 10;

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

/// A request without gaps: every value that decides the picture, chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The request with every default filled in.
    pub request: Request,
    /// Name of the base model.
    pub model: String,
    /// Picture size, px.
    pub size: Size,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Guidance rescale, `0.0..=1.0`.
    pub guidance_rescale: f64,
    /// How the halves of guidance run.
    pub guidance_runs: GuidanceRuns,
    /// Update rule.
    pub scheduler: SchedulerKind,
    /// Seed of the noise.
    pub seed: u64,
    /// Pictures in one run.
    pub batch: usize,
    /// Refiner and the share of the schedule before it.
    pub refine: Option<(String, f64)>,
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

    /// Fills every gap from the model's defaults and checks every value. `seed` is used where the request has none.
    ///
    /// # Errors
    /// [`Error::Request`] that names the field, what is allowed, and where it helps the nearest valid value.
    pub fn resolve(&self, catalogue: &Catalogue, seed: u64) -> Result<Resolved> {
        self.check_text()?;
        let name = self.model_name(catalogue)?;
        let model = catalogue.model("model", &name)?;
        self.check_pairs(model)?;
        let size = self.size(model)?;
        let steps = self.steps.unwrap_or(model.defaults.steps);
        let guidance = finite("guidance", self.guidance.unwrap_or(model.defaults.guidance))?;
        let guidance_rescale = finite("guidance-rescale", self.guidance_rescale.unwrap_or(0.0))?;
        if !(0.0..=1.0).contains(&guidance_rescale) {
            return Err(Error::request(
                "guidance-rescale",
                format!("{guidance_rescale} is outside 0.0 to 1.0"),
            ));
        }
        for (field, value) in [
            ("aesthetic-score", self.aesthetic_score),
            ("negative-aesthetic-score", self.negative_aesthetic_score),
        ] {
            value.map(|v| finite(field, v)).transpose()?;
        }
        let batch = self.batch.unwrap_or(1);
        if !(1..=MAX_BATCH).contains(&batch) {
            return Err(Error::request(
                "batch",
                format!("{batch} is outside 1 to {MAX_BATCH}"),
            ));
        }
        let scheduler = self.scheduler.or(model.defaults.scheduler).ok_or_else(|| {
            Error::request(
                "scheduler",
                format!(
                    "`{name}` has no default; choose one of {}",
                    SchedulerKind::known()
                ),
            )
        })?;
        let refine = self.refine(catalogue, model)?;
        let seed = self.seed.unwrap_or(seed);
        let mut request = self.clone();
        request.model = Some(name.clone());
        (request.width, request.height) = (Some(size.width), Some(size.height));
        (request.steps, request.guidance, request.seed) = (Some(steps), Some(guidance), Some(seed));
        (request.scheduler, request.batch) = (Some(scheduler), Some(batch));
        request.refine_at = refine.as_ref().map(|(_, at)| *at);
        let guidance_runs = self.guidance_runs.unwrap_or_default();
        Ok(Resolved {
            request,
            model: name,
            size,
            steps,
            guidance,
            guidance_rescale,
            guidance_runs,
            scheduler,
            seed,
            batch,
            refine,
        })
    }

    /// Fields that the reference would ignore in silence where they stand alone.
    fn check_pairs(&self, model: &Model) -> Result<()> {
        if self.negative_2.is_some()
            && self.negative.is_none()
            && model.force_zeros_for_empty_prompt
        {
            return Err(Error::request(
                "negative-2",
                "needs --negative too: without it this model's negative is zeros",
            ));
        }
        let sizes = [
            self.negative_original_size.is_some(),
            self.negative_target_size.is_some(),
        ];
        if sizes[0] != sizes[1] && !model.requires_aesthetics_score {
            let reason =
                "negative-original-size and negative-target-size have an effect only together";
            return Err(Error::request("negative-original-size", reason));
        }
        if self.negative_crop.is_some() && !sizes[0] && !model.requires_aesthetics_score {
            return Err(Error::request(
                "negative-crop",
                "needs negative-original-size and negative-target-size",
            ));
        }
        Ok(())
    }

    fn model_name(&self, catalogue: &Catalogue) -> Result<String> {
        if let Some(name) = &self.model {
            return Ok(name.clone());
        }
        let bases = catalogue
            .models
            .iter()
            .filter(|(_, m)| m.role == crate::manifest::Role::Base);
        let names: Vec<&str> = bases.map(|(name, _)| name.as_str()).collect();
        match names[..] {
            [only] => Ok(only.to_owned()),
            _ => Err(Error::request(
                "model",
                format!("name one of: {}", names.join(", ")),
            )),
        }
    }

    fn check_text(&self) -> Result<()> {
        let texts = [
            ("prompt", Some(&self.prompt)),
            ("prompt-2", self.prompt_2.as_ref()),
            ("negative", self.negative.as_ref()),
            ("negative-2", self.negative_2.as_ref()),
        ];
        for (field, text) in texts {
            if let Some(text) = text.filter(|t| t.len() > MAX_PROMPT) {
                return Err(Error::request(
                    field,
                    format!("has {} bytes; at most {MAX_PROMPT}", text.len()),
                ));
            }
        }
        Ok(())
    }

    fn size(&self, model: &Model) -> Result<Size> {
        let multiple = lcm(SIDE_MULTIPLE, model.vae.scale);
        let width = side(
            "width",
            self.width.unwrap_or(model.defaults.width),
            multiple,
        )?;
        let height = side(
            "height",
            self.height.unwrap_or(model.defaults.height),
            multiple,
        )?;
        if width * height > MAX_AREA {
            return Err(Error::request(
                "width",
                format!("{width}x{height} has more than {MAX_AREA} px"),
            ));
        }
        Ok(Size { width, height })
    }

    fn refine(&self, catalogue: &Catalogue, base: &Model) -> Result<Option<(String, f64)>> {
        let Some(name) = &self.refiner else {
            return match self.refine_at {
                None => Ok(None),
                Some(_) => Err(Error::request("refine-at", "needs --refiner NAME")),
            };
        };
        let at = finite("refine-at", self.refine_at.unwrap_or(DEFAULT_REFINE_AT))?;
        if at <= 0.0 || at >= 1.0 {
            return Err(Error::request(
                "refine-at",
                format!("{at} is not between 0 and 1, exclusive"),
            ));
        }
        let refiner = catalogue.model("refiner", name)?;
        base.latents_fit(refiner)
            .map_err(|reason| Error::request("refiner", format!("`{name}`: {reason}")))?;
        Ok(Some((name.clone(), at)))
    }
}

impl Resolved {
    /// Whether latents of `before` can go on as `self`: what shaped them must be the same.
    ///
    /// # Errors
    /// [`Error::Request`] that names the field.
    pub fn continues(&self, before: &Self) -> Result<()> {
        let fixed = [
            ("model", self.model == before.model),
            ("width", self.size.width == before.size.width),
            ("height", self.size.height == before.size.height),
            ("steps", self.steps == before.steps),
            ("scheduler", self.scheduler == before.scheduler),
            ("spacing", self.request.spacing == before.request.spacing),
            ("sigmas", self.request.sigmas == before.request.sigmas),
            ("seed", self.seed == before.seed),
            ("batch", self.batch == before.batch),
        ];
        match fixed.into_iter().find(|(_, same)| !same) {
            Some((field, _)) => Err(Error::request(
                field,
                "cannot change while going on from saved latents",
            )),
            None => Ok(()),
        }
    }
}

/// The share that SDXL's authors give the base ("ensemble of expert denoisers").
const DEFAULT_REFINE_AT: f64 = 0.8;

impl Model {
    /// Whether `refiner` can continue this model's latents; the reason if not.
    fn latents_fit(&self, refiner: &Self) -> Result<(), String> {
        if self.unet.in_channels != refiner.unet.in_channels || self.vae.scale != refiner.vae.scale
        {
            return Err("its latents have another shape than the base's".into());
        }
        if self.vae != refiner.vae {
            return Err(
                "its VAE's constants differ from the base's, so the latents mean something else"
                    .into(),
            );
        }
        Ok(())
    }
}

fn finite(field: &'static str, value: f64) -> Result<f64> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err(Error::request(
            field,
            format!("{value} is not a finite number"),
        ))
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

fn side(field: &'static str, value: usize, multiple: usize) -> Result<usize> {
    if value == 0 || value > MAX_SIDE {
        return Err(Error::request(
            field,
            format!("{value} is outside {multiple} to {MAX_SIDE} px"),
        ));
    }
    if !value.is_multiple_of(multiple) {
        let nearest = ((value + multiple / 2) / multiple * multiple).max(multiple);
        return Err(Error::request(
            field,
            format!("{value} is not a multiple of {multiple}; the nearest is {nearest}"),
        ));
    }
    Ok(value)
}

mod text_forms {
    //! Values that are written as text in JSON and on the command line alike.

    use std::fmt;
    use std::str::FromStr;

    use super::{Corner, GuidanceRuns, Size, StopAt, VaeTiling};

    fn pair(text: &str, separator: char) -> Option<(usize, usize)> {
        let (a, b) = text.split_once(separator)?;
        Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
    }

    impl FromStr for Size {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            let (width, height) = pair(text, 'x')
                .ok_or_else(|| format!("`{text}` is not WIDTHxHEIGHT, e.g. 1024x768"))?;
            Ok(Self { width, height })
        }
    }

    impl fmt::Display for Size {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}x{}", self.width, self.height)
        }
    }

    impl FromStr for Corner {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            let (top, left) =
                pair(text, ',').ok_or_else(|| format!("`{text}` is not TOP,LEFT, e.g. 0,0"))?;
            Ok(Self { top, left })
        }
    }

    impl fmt::Display for Corner {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{},{}", self.top, self.left)
        }
    }

    impl FromStr for StopAt {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            if text == "handoff" {
                return Ok(Self::Handoff);
            }
            text.parse()
                .map(Self::Step)
                .map_err(|_| format!("`{text}` is neither a number of steps nor `handoff`"))
        }
    }

    impl fmt::Display for StopAt {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Self::Step(step) => write!(f, "{step}"),
                Self::Handoff => f.write_str("handoff"),
            }
        }
    }

    impl FromStr for GuidanceRuns {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            match text {
                "batch" => Ok(Self::Batch),
                "split" => Ok(Self::Split),
                _ => Err(format!("`{text}` is not known; known: batch, split")),
            }
        }
    }

    impl FromStr for VaeTiling {
        type Err = String;
        fn from_str(text: &str) -> Result<Self, String> {
            match text {
                "auto" => Ok(Self::Auto),
                "on" => Ok(Self::On),
                "off" => Ok(Self::Off),
                _ => Err(format!("`{text}` is not known; known: auto, on, off")),
            }
        }
    }

    macro_rules! serde_as_text {
        ($($type:ty),*) => {$(
            impl serde::Serialize for $type {
                fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                    s.collect_str(self)
                }
            }
            impl<'de> serde::Deserialize<'de> for $type {
                fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                    let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                    text.parse().map_err(serde::de::Error::custom)
                }
            }
        )*};
    }
    serde_as_text!(Size, Corner);

    // A step is a number in JSON, `handoff` a string.
    impl serde::Serialize for StopAt {
        fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            match self {
                Self::Step(step) => s.serialize_u64(*step as u64),
                Self::Handoff => s.serialize_str("handoff"),
            }
        }
    }

    impl<'de> serde::Deserialize<'de> for StopAt {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            match serde_json::Value::deserialize(d)? {
                serde_json::Value::Number(n) => {
                    n.as_u64().map(|n| Self::Step(n as usize)).ok_or_else(|| {
                        serde::de::Error::custom(format!("{n} is not a number of steps"))
                    })
                }
                serde_json::Value::String(s) => s.parse().map_err(serde::de::Error::custom),
                other => Err(serde::de::Error::custom(format!(
                    "{other} is neither a number of steps nor `handoff`"
                ))),
            }
        }
    }
}
