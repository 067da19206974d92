//! Fills a request's gaps from the model's defaults, and checks every value.

mod images;
mod loras;

use super::{Interval, LongPrompts, PromptSyntax, Request, Resolved, Size, VaeTiling};
use crate::error::{Error, Result};
use crate::manifest::{Catalogue, Model, Role};
use crate::schedulers::SchedulerKind;

/// SDXL's latents and its reference pipeline want picture sides that are multiples of this.
const SIDE_MULTIPLE: usize = 8;
/// Largest picture area, px: more is out of reach of a VAE even in tiles, and usually a slip of the keyboard.
const MAX_AREA: usize = 1 << 26;
/// Largest side, px.
const MAX_SIDE: usize = 16_384;
/// Most pictures in one run.
const MAX_BATCH: usize = 64;
/// Fewest latents along a tile's side; below, the overlaps are most of the work.
const SMALLEST_TILE: usize = 8;
/// Longest prompt, bytes.
const MAX_PROMPT: usize = 64 << 10;

impl Request {
    /// Fills every gap from the model's defaults and checks every value. `seed` is used where the request has none.
    ///
    /// # Errors
    /// [`Error::Request`] that names the field, what is allowed, and where it helps the nearest valid value.
    pub fn resolve(&self, catalogue: &Catalogue, seed: u64) -> Result<Resolved> {
        self.check_text()?;
        let name = self.model_name(catalogue)?;
        let named = self.named_loras(catalogue, catalogue.model("model", &name)?)?;
        let model = &loras::changed(catalogue.model("model", &name)?, &named);
        self.check_pairs(model)?;
        let size = self.size(model)?;
        let steps = self.step_count(model);
        let (guidance, guidance_rescale) = self.guidances(model, steps)?;
        for (field, value) in [
            ("aesthetic-score", self.aesthetic_score),
            ("negative-aesthetic-score", self.negative_aesthetic_score),
        ] {
            value.map(|v| finite(field, v)).transpose()?;
        }
        let batch = self.batch_size()?;
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
        self.check_tile(
            refine
                .as_ref()
                .map_or(Ok(model), |(name, _)| catalogue.model("refiner", name))?,
        )?;
        let image_prompts = self.heard_images(model)?;
        let distilled = loras::distilled(&name, model, &named);
        let seeds = self.seed.clone().unwrap_or_else(|| seed.into());
        let mut request = self.clone();
        request.model = Some(name.clone());
        (request.width, request.height) = (Some(size.width), Some(size.height));
        (request.steps, request.seed) = (Some(steps), Some(seeds.clone()));
        request.guidance = self.guidance_list.is_none().then_some(guidance);
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
            seeds: seeds.all().to_vec(),
            batch,
            refine,
            image_prompts,
            scheduler_config: model.scheduler.clone(),
            distilled,
        })
    }

    /// Guidance scale and rescale, after everything about guidance has been checked.
    fn guidances(&self, model: &Model, steps: usize) -> Result<(f64, f64)> {
        // Networks and guidance compute in f32.
        let scale = |field, value: f64| finite(field, f64::from(value as f32)).map(|_| value);
        let guidance = scale("guidance", self.guidance.unwrap_or(model.defaults.guidance))?;
        if let Some(list) = &self.guidance_list {
            list.iter()
                .try_for_each(|value| scale("guidance-list", *value).map(drop))?;
            if self.guidance.is_some() {
                let reason = "stands in place of guidance; give one of the two";
                return Err(Error::request("guidance-list", reason));
            }
            if list.is_empty() || list.len() > steps {
                let reason = format!("has {} values; give 1 to {steps}, one a step", list.len());
                return Err(Error::request("guidance-list", reason));
            }
        }
        if let Some(Interval { low, high }) = self.guidance_interval
            && !(0.0 <= low && low < high && high.is_finite())
        {
            let reason = format!("{low},{high} is no interval of noise levels: 0 <= LOW < HIGH");
            return Err(Error::request("guidance-interval", reason));
        }
        let rescale = finite("guidance-rescale", self.guidance_rescale.unwrap_or(0.0))?;
        if !(0.0..=1.0).contains(&rescale) {
            let reason = format!("{rescale} is outside 0.0 to 1.0");
            return Err(Error::request("guidance-rescale", reason));
        }
        Ok((guidance, rescale))
    }

    /// Fields that the reference would ignore in silence where they stand alone.
    fn check_pairs(&self, model: &Model) -> Result<()> {
        if self.long_prompts == Some(LongPrompts::Cut)
            && self.prompt_syntax == Some(PromptSyntax::A1111)
        {
            let reason = "`cut` goes with prompt-syntax plain; a1111 reads long prompts in chunks";
            return Err(Error::request("long-prompts", reason));
        }
        let scored = model.requires_aesthetics_score || self.refiner.is_some();
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
        if sizes[0] != sizes[1] && !scored {
            let reason =
                "negative-original-size and negative-target-size have an effect only together";
            return Err(Error::request("negative-original-size", reason));
        }
        if self.negative_crop.is_some() && !sizes[0] && !scored {
            return Err(Error::request(
                "negative-crop",
                "needs negative-original-size and negative-target-size",
            ));
        }
        Ok(())
    }

    /// Number of steps; a list of levels or timesteps says how many there are.
    fn step_count(&self, model: &Model) -> usize {
        let listed = match (&self.sigmas_list, &self.timesteps_list) {
            (Some(sigmas), _) => Some(sigmas.len().saturating_sub(1)),
            (None, timesteps) => timesteps.as_ref().map(Vec::len),
        };
        self.steps.or(listed).unwrap_or(model.defaults.steps)
    }

    /// The model's name: the one that is given, or the catalogue's default ([`Catalogue::default_model`]).
    ///
    /// # Errors
    /// [`Error::Request`] that lists the base models when none is named and there is no default.
    pub fn model_name(&self, catalogue: &Catalogue) -> Result<String> {
        if let Some(name) = self.model.as_deref().or(catalogue.default_model()) {
            return Ok(name.to_owned());
        }
        let bases = catalogue
            .models
            .iter()
            .filter(|(_, m)| m.role == Role::Base);
        let names: Vec<&str> = bases.map(|(name, _)| name.as_str()).collect();
        let reason = format!("name one of: {}", names.join(", "));
        Err(Error::request("model", reason))
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

    /// Number of pictures: that of the batch, else one a seed.
    pub fn pictures(&self) -> usize {
        let seeds = self.seed.as_ref().map_or(1, |seeds| seeds.all().len());
        self.batch.unwrap_or(seeds)
    }

    fn batch_size(&self) -> Result<usize> {
        let seeds = self.seed.as_ref().map_or(1, |seeds| seeds.all().len());
        let batch = self.pictures();
        if seeds > 1 && seeds != batch {
            let reason =
                format!("names {seeds} seeds for {batch} pictures; give one, or one a picture");
            return Err(Error::request("seed", reason));
        }
        if (1..=MAX_BATCH).contains(&batch) {
            return Ok(batch);
        }
        Err(Error::request(
            "batch",
            format!("{batch} is outside 1 to {MAX_BATCH}"),
        ))
    }

    /// A tile is whole latents, and enough of them to be worth decoding.
    fn check_tile(&self, decoder: &Model) -> Result<()> {
        let Some(VaeTiling::Tile(px)) = self.vae_tiling else {
            return Ok(());
        };
        let (scale, smallest) = (decoder.vae.scale, SMALLEST_TILE * decoder.vae.scale);
        if px < smallest || !px.is_multiple_of(scale) {
            return Err(Error::request(
                "vae-tiling",
                format!("{px} is not a tile's side: a multiple of {scale}, at least {smallest} px"),
            ));
        }
        Ok(())
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

/// The share that SDXL's authors give the base ("ensemble of expert denoisers").
const DEFAULT_REFINE_AT: f64 = 0.8;

impl Model {
    /// Whether `refiner` can continue this model's latents; the reason if not.
    fn latents_fit(&self, refiner: &Self) -> Result<(), String> {
        if self.unet.in_channels != refiner.unet.in_channels || self.vae.scale != refiner.vae.scale
        {
            return Err("its latents have another shape than the base's".into());
        }
        let meaning = |m: &Self| {
            let v = m.vae.clone();
            (v.scaling_factor, v.latents_mean, v.latents_std)
        };
        if meaning(self) != meaning(refiner) {
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
