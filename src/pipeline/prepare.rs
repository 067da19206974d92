//! A request becomes a plan: the schedule, its segments, and what each segment's network is told.

use std::collections::BTreeMap;
use std::ops::Range;

use ndarray::{Array2, Array3, Axis, Ix4, s};

use super::Pipeline;
use crate::conditioning::{Prompts, Tokenized, micro_conditioning};
use crate::error::{Error, Result};
use crate::memory::MemoryMode;
use crate::plan::{
    AttentionSource, Branch, Conditioning, Guidance, Plan, Segment, SourceKind, names,
};
use crate::progress::{Event, Observer, Stage};
use crate::request::Resolved;
use crate::schedule::Schedule;
use crate::tensor::Tensor;
use crate::text::embed;

impl Pipeline {
    /// The schedule that a request runs on.
    ///
    /// # Errors
    /// [`Error::Request`] for step counts, spacings or curves that the scheduler does not have.
    pub fn schedule(&self, request: &Resolved) -> Result<Schedule> {
        let model = self.catalogue().model("model", &request.model)?;
        request
            .scheduler
            .plan(&model.scheduler, &request.sampling())
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
        let guidance = Guidance::of(request);
        self.warn_of_idle_fields(request, guidance, observer)?;
        self.warn_of_schedule(request, &schedule, observer)?;
        let parts = segments(request, &schedule)?;
        let base = self.catalogue().model("model", &request.model)?;
        self.check_refiner(request, &schedule)?;
        let mut segments = Vec::new();
        for (model, span) in parts {
            if span.start.max(steps.start) < span.end.min(steps.end) {
                schedule.accepts(
                    self.catalogue()
                        .model("model", model)?
                        .scheduler
                        .prediction()?,
                )?;
                segments.push(self.prepare_segment(request, model, span, observer)?);
            }
        }
        let (height, width) = (
            request.size.height / base.vae.scale,
            request.size.width / base.vae.scale,
        );
        Ok(Plan {
            schedule,
            scheduler: request.scheduler,
            guidance,
            memory: request.memory(),
            segments,
            latents: [request.batch, base.unet.in_channels, height, width],
        })
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

    fn prepare_segment(
        &self,
        request: &Resolved,
        name: &str,
        steps: Range<usize>,
        observer: &mut Observer<'_>,
    ) -> Result<Segment> {
        let guided = Guidance::of(request).is_on();
        let model = self.catalogue().model("model", name)?;
        let prompts = Prompts::new(&request.request, model, guided);
        let (hidden, pooled) = self.encode(name, &prompts, request.memory(), observer)?;
        let mut sources = self.text_source(name, hidden, request.memory(), observer)?;
        let (positive_ids, negative_ids) =
            micro_conditioning(&request.request, model, request.size, steps.start > 0);
        let rows = pooled.dim().0;
        let mut branch = |row: usize, time_ids| Branch {
            text_embeds: pooled.slice(s![row..=row, ..]).to_owned(),
            time_ids,
            sources: vec![sources.remove(0)],
        };
        let negative = (rows == 2).then(|| branch(0, negative_ids));
        let positive = branch(rows - 1, positive_ids);
        Ok(Segment {
            steps,
            model: name.to_owned(),
            prediction: model.scheduler.prediction()?,
            conditioning: Conditioning { positive, negative },
        })
    }

    /// Runs every text encoder of a model over the prompts: embeddings `[branches, tokens, context]` and pooled
    /// `[branches, width]`, the negative branch first where there is one.
    ///
    /// # Errors
    /// Those of loading and running text encoders; [`Error::Contract`] when they do not fit together.
    pub fn encode(
        &self,
        name: &str,
        prompts: &Prompts,
        memory: MemoryMode,
        observer: &mut Observer<'_>,
    ) -> Result<(Array3<f32>, Array2<f32>)> {
        let model = self.catalogue().model("model", name)?;
        let mut encoded = Vec::new();
        for (place, entry) in model.text.iter().enumerate() {
            let tokenizer = self.tokenizer(entry, observer)?;
            let tokens = prompts.tokenize(place, &tokenizer)?;
            self.warn_of_dropped_words(&tokens, &entry.encoder, observer)?;
            let mut encoder = self.network(name, &entry.encoder, memory, observer)?;
            self.begin_stage(observer, Stage::Text, &entry.encoder)?;
            let sequences = tokens
                .negative
                .iter()
                .chain([&tokens.positive])
                .collect::<Vec<_>>();
            encoded.push(embed(&mut encoder.session, &entry.encoder, &sequences)?);
            self.give_back(encoder);
        }
        prompts.join(model, &encoded)
    }

    /// Projects text embeddings `[branches, tokens, context]` to one attention source a branch.
    fn text_source(
        &self,
        name: &str,
        hidden: Array3<f32>,
        memory: MemoryMode,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<AttentionSource>> {
        let model = self.catalogue().model("model", name)?;
        let branches = hidden.dim().0;
        let mut kv = self.network(name, names::KV, memory, observer)?;
        self.begin_stage(observer, Stage::Text, names::KV)?;
        let feed = (names::ENCODER_HIDDEN_STATES, &Tensor::from(hidden));
        let mut outputs = kv.session.run(&[feed])?;
        self.give_back(kv);
        let mut packed = BTreeMap::new();
        for (width, layers) in &model.unet.kv {
            let tensor = names::text_kv(*width);
            let fail = |actual: String| Error::Contract {
                graph: names::KV.into(),
                tensor: tensor.clone(),
                expected: format!("[{}, {branches}, tokens, {width}]", 2 * layers),
                actual,
            };
            let Some(Tensor::F32(array)) = outputs.remove(&tensor) else {
                return Err(fail("no such output".into()));
            };
            let array = array
                .into_dimensionality::<Ix4>()
                .map_err(|e| fail(e.to_string()))?;
            let (rows, found_branches, _, found_width) = array.dim();
            if (rows, found_branches, found_width) != (2 * layers, branches, *width) {
                return Err(fail(format!("{:?}", array.shape())));
            }
            if !crate::tensor::all_finite(&array) {
                return Err(Error::NonFinite {
                    component: names::KV.into(),
                    step: None,
                    remedy: "check the checkpoint's UNet weights",
                });
            }
            packed.insert(*width, array);
        }
        let of_branch = |b: usize| {
            let kv = packed
                .iter()
                .map(|(w, a)| (*w, a.slice_axis(Axis(1), (b..=b).into()).to_owned()))
                .collect();
            AttentionSource {
                kind: SourceKind::Text,
                kv,
            }
        };
        Ok((0..branches).map(of_branch).collect())
    }

    fn warn_of_dropped_words(
        &self,
        tokens: &Tokenized,
        encoder: &str,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        for (what, tokens) in [
            ("prompt", Some(&tokens.positive)),
            ("negative prompt", tokens.negative.as_ref()),
        ] {
            if let Some(words) = tokens.and_then(|t| t.dropped.as_deref()) {
                let room = tokens.map_or(0, |t| t.ids.len());
                let warning = format!(
                    "the {what} is longer than {encoder}'s {room} tokens; dropped: {:?}",
                    words.trim()
                );
                self.notify(observer, Event::Warning(&warning), 0)?;
            }
        }
        Ok(())
    }

    /// Warns of a schedule that can hardly give a picture.
    fn warn_of_schedule(
        &self,
        request: &Resolved,
        schedule: &Schedule,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let config = &self.catalogue().model("model", &request.model)?.scheduler;
        match request.scheduler.advice(config, schedule) {
            Some(warning) => self.notify(observer, Event::Warning(&warning), 0),
            None => Ok(()),
        }
    }

    /// Warns of fields that the request could do without.
    fn warn_of_idle_fields(
        &self,
        request: &Resolved,
        guidance: Guidance,
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
        let off = !guidance.is_on();
        let idle = [
            (
                off && fields.negative.is_some(),
                "negative",
                "guidance is off at 1 or less",
            ),
            (
                off && guidance.rescale > 0.0,
                "guidance-rescale",
                "guidance is off at 1 or less",
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

/// The models of a request and the steps that each runs.
fn segments<'a>(
    request: &'a Resolved,
    schedule: &Schedule,
) -> Result<Vec<(&'a str, Range<usize>)>> {
    let Some((refiner, at)) = &request.refine else {
        return Ok(vec![(&request.model, 0..schedule.steps())]);
    };
    let cut = schedule.handoff(*at);
    if cut == 0 || cut == schedule.steps() {
        let who = if cut == 0 { "base" } else { "refiner" };
        let reason = format!(
            "{at} leaves no step of {} for the {who}; use more steps or another share",
            schedule.steps()
        );
        return Err(Error::request("refine-at", reason));
    }
    Ok(vec![
        (&request.model, 0..cut),
        (refiner, cut..schedule.steps()),
    ])
}
