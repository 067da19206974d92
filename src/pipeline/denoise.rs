//! The loop: segment by segment, step by step.

use std::ops::Range;

use super::Pipeline;
use super::guidance::Denoiser;
use super::handoff::LatentHandoff;
use crate::error::{Error, Result};
use crate::plan::{Plan, Segment};
use crate::progress::{Control, Event, Observer, Stage};
use crate::runtime::Session;
use crate::schedulers::Step;
use crate::tensor::{Latents, all_finite};

/// Consecutive segments of one model, and the steps of them that one call runs.
struct Leg<'a> {
    plan: &'a Plan,
    segments: &'a [Segment],
    steps: Range<usize>,
}

impl Pipeline {
    /// Takes `from` through the plan up to step `until` (exclusive; the schedule's length for the whole way).
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::NonFinite`] with component and step, and those of loading and running networks.
    pub fn denoise(
        &self,
        plan: &Plan,
        from: LatentHandoff,
        until: usize,
        observer: &mut Observer<'_>,
    ) -> Result<LatentHandoff> {
        let mut state = from;
        for segments in plan.segments.chunk_by(|a, b| a.since == b.since) {
            let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
                continue;
            };
            let steps = first.steps.start.max(state.next_step)..last.steps.end.min(until);
            if steps.is_empty() {
                continue;
            }
            let loading = self.loading(plan.memory, &plan.loras, observer)?;
            let mut unet =
                self.network(&first.model, first.form.component(), &loading, observer)?;
            let leg = Leg {
                plan,
                segments,
                steps,
            };
            state = self.walk(&mut unet.session, &leg, state, observer)?;
            self.give_back(unet);
        }
        Ok(state)
    }

    /// Runs the steps of one leg.
    fn walk(
        &self,
        unet: &mut Session,
        leg: &Leg<'_>,
        from: LatentHandoff,
        observer: &mut Observer<'_>,
    ) -> Result<LatentHandoff> {
        let Leg { plan, segments, .. } = leg;
        let LatentHandoff {
            mut latents,
            mut noise,
            history,
            ..
        } = from;
        let mut denoiser = Denoiser::new(unet, plan);
        let mut scheduler = plan.scheduler.start(&plan.schedule)?;
        // Every model starts afresh; only a run that was stopped inside its steps has a history to go on with.
        if segments.first().is_some_and(|s| leg.steps.start > s.since) {
            scheduler.restore(history)?;
        }
        for at in 0..segments.len() {
            let segment = &segments[at];
            let steps =
                segment.steps.start.max(leg.steps.start)..segment.steps.end.min(leg.steps.end);
            if steps.is_empty() {
                continue;
            }
            denoiser.tell(&segments[at..])?;
            if steps.start == leg.steps.start {
                self.begin_stage(observer, Stage::Denoise, &segment.model)?;
            }
            for index in steps {
                let at = Step {
                    schedule: &plan.schedule,
                    index,
                    prediction: segment.prediction,
                    noise: &mut noise,
                };
                let mut predict = |input: &Latents, timestep: f64| {
                    let output = denoiser.predict(index, input, timestep)?;
                    let event = Event::ModelOutput {
                        step: index,
                        timestep,
                        input,
                        output: &output,
                    };
                    self.notify(observer, event, index)?;
                    Ok(output)
                };
                let stepped = scheduler.step(at, latents, &mut predict);
                latents = stepped.map_err(|e| at_step(e, index))?;
                check_finite(&latents, plan, index)?;
                let event = Event::Step {
                    done: index + 1,
                    total: plan.schedule.steps(),
                    latents: &latents,
                };
                self.notify(observer, event, index)?;
            }
        }
        Ok(LatentHandoff {
            latents,
            next_step: leg.steps.end,
            noise,
            history: scheduler.history(),
        })
    }

    /// Tells the observer that a stage begins.
    pub(super) fn begin_stage(
        &self,
        observer: &mut Observer<'_>,
        stage: Stage,
        what: &str,
    ) -> Result<()> {
        self.notify(observer, Event::Stage { stage, what }, 0)
    }

    /// Passes an event on; the observer's wish to stop becomes an error.
    pub(super) fn notify(
        &self,
        observer: &mut Observer<'_>,
        event: Event<'_>,
        step: usize,
    ) -> Result<()> {
        match observer(event) {
            Control::Continue if !self.runtime().cancel().is_cancelled() => Ok(()),
            _ => Err(Error::Cancelled { step }),
        }
    }
}

/// A scheduler can overflow on outputs that are finite.
fn check_finite(latents: &Latents, plan: &Plan, index: usize) -> Result<()> {
    if all_finite(latents) {
        return Ok(());
    }
    Err(Error::NonFinite {
        component: plan.scheduler.to_string(),
        step: Some(index),
        remedy: "the latents overflowed; lower the guidance or its rescaling",
    })
}

/// Adds the step to errors of networks that do not know it.
fn at_step(error: Error, index: usize) -> Error {
    match error {
        Error::Cancelled { .. } => Error::Cancelled { step: index },
        Error::NonFinite {
            component, remedy, ..
        } => Error::NonFinite {
            component,
            step: Some(index),
            remedy,
        },
        other => other,
    }
}
