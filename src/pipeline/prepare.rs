//! A request becomes a plan: the schedule, its segments, and what each segment's network is told.

use std::ops::Range;

use ndarray::Axis;

use super::Pipeline;
use super::encode::Read;
use super::segments::{Cut, cost};
use crate::conditioning::micro_conditioning;
use crate::error::{Error, Result};
use crate::plan::{Branch, Guidance, Plan, Segment, UnetForm, names};
use crate::progress::{Event, Observer, Stage};
use crate::request::Resolved;
use crate::schedule::{Schedule, SchedulerConfig};

/// A branch before it is encoded.
#[derive(Debug, PartialEq)]
struct Wanted {
    /// What it is told, a place in a list.
    told: usize,
    /// How long: both branches of a segment have the same number of tokens, so a text may need several lengths.
    chunks: usize,
    negative: bool,
    /// Image prompts, by their places in the request.
    images: Vec<usize>,
}

impl Wanted {
    /// Its place in a list that holds each once.
    fn place(self, list: &mut Vec<Self>) -> usize {
        list.iter()
            .position(|other| *other == self)
            .unwrap_or_else(|| {
                list.push(self);
                list.len() - 1
            })
    }
}

impl Pipeline {
    /// The schedule that a request runs on.
    ///
    /// # Errors
    /// [`Error::Request`] for step counts, spacings or curves that the scheduler does not have.
    pub fn schedule(&self, request: &Resolved) -> Result<Schedule> {
        request
            .scheduler
            .plan(&request.scheduler_config, &request.sampling())
    }

    /// Works out the plan of a request, as far as `steps` need it: prompts are encoded for the segments that will run.
    ///
    /// # Errors
    /// Those of loading and running text encoders; [`Error::Request`] for a refiner that would get no step.
    pub fn prepare(
        &self,
        request: &Resolved,
        schedule: Schedule,
        steps: &Range<usize>,
        observer: &mut Observer<'_>,
    ) -> Result<Plan> {
        let guidance = Guidance::of(request, &schedule);
        self.warn_of_idle_fields(request, &guidance, observer)?;
        self.warn_of_schedule(request, &schedule, observer)?;
        self.warn_of_distillation(request, &schedule, &guidance, observer)?;
        let base = self.catalogue().model("model", &request.model)?;
        self.check_refiner(request, &schedule)?;
        let cuts = self.cuts(request, &schedule, &guidance, steps)?;
        if !cuts.is_empty() {
            let note = cost(request, &schedule, &cuts, steps)?;
            self.notify(observer, Event::Note(&note), 0)?;
        }
        let (height, width) = (
            request.size.height / base.vae.scale,
            request.size.width / base.vae.scale,
        );
        let mut plan = Plan {
            schedule,
            scheduler: request.scheduler,
            guidance,
            memory: request.memory(),
            loras: request.lora_set(),
            branches: Vec::new(),
            segments: Vec::new(),
            latents: [request.batch, base.unet.in_channels, height, width],
        };
        for of_model in cuts.chunk_by(|a, b| a.since == b.since) {
            self.prepare_model(request, of_model, &mut plan, observer)?;
        }
        Ok(plan)
    }

    /// The configuration of a model's scheduler: what LoRAs replace in it is the base's alone.
    pub(super) fn scheduler_config<'a>(
        &'a self,
        request: &'a Resolved,
        model: &str,
    ) -> Result<&'a SchedulerConfig> {
        if model == request.model {
            return Ok(&request.scheduler_config);
        }
        Ok(&self.catalogue().model("refiner", model)?.scheduler)
    }

    /// One schedule serves both models only if both were trained on the same noise levels.
    fn check_refiner(&self, request: &Resolved, schedule: &Schedule) -> Result<()> {
        let Some((name, _)) = &request.refine else {
            return Ok(());
        };
        let config = &self.catalogue().model("refiner", name)?.scheduler;
        let own = request.scheduler.plan(config, &request.sampling())?;
        if own.training != schedule.training {
            let reason = format!(
                "`{name}` was trained on other noise levels than `{}`",
                request.model
            );
            return Err(Error::request("refiner", reason));
        }
        if (&own.timesteps, &own.sigmas) != (&schedule.timesteps, &schedule.sigmas) {
            let reason = format!(
                "`{name}` and `{}` are configured for different timesteps; give --spacing and --sigmas for both",
                request.model
            );
            return Err(Error::request("refiner", reason));
        }
        Ok(())
    }

    /// Adds the segments of one model and everything that they are told.
    fn prepare_model(
        &self,
        request: &Resolved,
        cuts: &[Cut<'_>],
        plan: &mut Plan,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let Some(Cut {
            model: name, since, ..
        }) = cuts.first()
        else {
            return Ok(());
        };
        let mut told = Vec::new();
        for what in cuts
            .iter()
            .flat_map(|cut| cut.negative.iter().chain([&cut.positive]))
        {
            if !told.contains(what) {
                told.push(what.clone());
            }
        }
        let reads = self.read(request, name, &told, observer)?;
        let place = |what| told.iter().position(|t| t == what).unwrap_or_default();
        let mut wanted = Vec::<Wanted>::new();
        let form = self.unet_form(cuts, plan.latents)?;
        for cut in cuts {
            let (positive, negative) = (place(&cut.positive), cut.negative.as_ref().map(place));
            let chunks = negative.map_or(0, |n| reads[n].chunks());
            let chunks = chunks.max(reads[positive].chunks());
            let mut branch = |told: usize, negative: bool| {
                let images = cut.images.clone();
                let branch = Wanted {
                    told,
                    chunks,
                    negative,
                    images,
                };
                plan.branches.len() + branch.place(&mut wanted)
            };
            let negative = negative.map(|told| branch(told, true));
            plan.segments.push(Segment {
                steps: cut.steps.clone(),
                since: *since,
                model: (*name).to_owned(),
                form: form.clone(),
                prediction: self.scheduler_config(request, name)?.prediction()?,
                positive: branch(positive, false),
                negative,
            });
        }
        let branches = self.branches((request, name), cuts, (&reads, wanted), observer)?;
        plan.branches.extend(branches);
        Ok(())
    }

    /// Encodes what the branches of one model are told.
    fn branches(
        &self,
        (request, name): (&Resolved, &str),
        cuts: &[Cut<'_>],
        (reads, wanted): (&[Read], Vec<Wanted>),
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Branch>> {
        let model = self.catalogue().model("model", name)?;
        // Pictures first: a bad one fails before anything is computed.
        let guided = cuts.iter().any(|cut| cut.negative.is_some());
        let used = cuts.iter().flat_map(|cut| cut.images.iter().copied());
        let images = self.image_sources((request, name), &used.collect(), guided, observer)?;
        let texts = wanted.iter().map(|w| (&reads[w.told], w.chunks));
        let encoded = self.encode(request, name, &texts.collect::<Vec<_>>(), observer)?;
        let hidden = encoded.iter().map(|e| e.hidden.clone());
        let texts = self.keys_values((request, name, names::KV), Stage::Text, hidden, observer)?;
        let refines = cuts.first().is_some_and(|cut| cut.since > 0);
        let rows = micro_conditioning(&request.request, model, request.size, refines);
        let branches = wanted.into_iter().zip(encoded).zip(texts);
        let branches = branches.map(|((wanted, encoded), text)| {
            let sources = wanted.images.iter().filter_map(|at| images.get(at));
            let images = sources.flat_map(|sources| sources.of(wanted.negative));
            Branch {
                text_embeds: encoded.pooled.insert_axis(Axis(0)),
                time_ids: if wanted.negative { &rows.1 } else { &rows.0 }.clone(),
                text,
                images: images.cloned().collect(),
            }
        });
        Ok(branches.collect())
    }

    /// The form of the UNet that all segments of a model run, so that one network serves them.
    fn unet_form(&self, cuts: &[Cut<'_>], latents: [usize; 4]) -> Result<UnetForm> {
        let Some(cut) = cuts.iter().find(|cut| !cut.images.is_empty()) else {
            return Ok(UnetForm::Text);
        };
        let unet = &self.catalogue().model("model", cut.model)?.unet;
        let [.., height, width] = latents;
        let places = unet.grids(height, width);
        Ok(UnetForm::Image {
            places: places
                .into_iter()
                .map(|(factor, (h, w))| (factor, h * w))
                .collect(),
        })
    }

    /// Warns of a schedule that can hardly give a picture.
    fn warn_of_schedule(
        &self,
        request: &Resolved,
        schedule: &Schedule,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let config = &request.scheduler_config;
        match request.scheduler.advice(config, schedule) {
            Some(warning) => self.notify(observer, Event::Warning(&warning), 0),
            None => Ok(()),
        }
    }

    /// Warns of fields that the request could do without.
    fn warn_of_idle_fields(
        &self,
        request: &Resolved,
        guidance: &Guidance,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let fields = &request.request;
        let base = self.catalogue().model("model", &request.model)?;
        let mut models = vec![base];
        if let Some((refiner, _)) = &request.refine {
            models.push(self.catalogue().model("refiner", refiner)?);
        }
        let scores = fields.aesthetic_score.is_some() || fields.negative_aesthetic_score.is_some();
        let takes_scores = models.iter().any(|m| m.requires_aesthetics_score);
        let off = (0..guidance.scales.len()).all(|step| !guidance.is_on(step));
        let scaled = (0..guidance.scales.len())
            .any(|step| request.guidance_at(step, guidance.scales.len()) > 1.0);
        let why = if scaled {
            "guidance-interval leaves no step with guidance"
        } else {
            "guidance is off at 1 or less"
        };
        let idle = [
            (off && fields.negative.is_some(), "negative", why),
            (off && guidance.rescale > 0.0, "guidance-rescale", why),
            (off && scaled, "guidance", why),
            (
                off && !scaled && fields.guidance_interval.is_some(),
                "guidance-interval",
                why,
            ),
            (
                scores && !takes_scores,
                "aesthetic-score",
                "no model of this run takes one",
            ),
            (
                fields.prompt_2.is_some() && models.iter().all(|m| m.text.len() < 2),
                "prompt-2",
                "no model of this run has a second text encoder",
            ),
        ];
        for (_, field, why) in idle.into_iter().filter(|(is_idle, ..)| *is_idle) {
            let warning = format!("{field} has no effect: {why}");
            self.notify(observer, Event::Warning(&warning), 0)?;
        }
        Ok(())
    }
}
