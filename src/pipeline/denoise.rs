//! The loop: segment by segment, step by step.

use std::ops::Range;

use super::Pipeline;
use super::guidance::Denoiser;
use super::handoff::LatentHandoff;
use crate::error::{Error, Result};
use crate::plan::{Plan, Segment, names};
use crate::progress::{Control, Event, Observer, Stage};
use crate::runtime::Session;
use crate::schedulers::Step;
use crate::tensor::{Latents, all_finite};

/// The steps of one segment that one call runs.
struct Leg<'a> {
    plan: &'a Plan,
    segment: &'a Segment,
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
        for segment in &plan.segments {
            let steps = segment.steps.start.max(state.next_step)..segment.steps.end.min(until);
            if steps.is_empty() {
                continue;
            }
            let mut unet = self.network(&segment.model, names::UNET, plan.memory, observer)?;
            let leg = Leg {
                plan,
                segment,
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
        let Leg {
            plan,
            segment,
            steps,
        } = leg;
        let LatentHandoff {
            mut latents,
            mut noise,
            history,
            ..
        } = from;
        let shape = latents.dim();
        let mut denoiser = Denoiser::new(unet, &segment.conditioning, plan.guidance, shape)?;
        let mut scheduler = plan.scheduler.start(&plan.schedule)?;
        // A segment starts afresh; only a run that was stopped inside one has a history to go on with.
        if steps.start > segment.steps.start {
            scheduler.restore(history)?;
        }
        self.begin_stage(observer, Stage::Denoise, &segment.model)?;
        for index in steps.clone() {
            let (schedule, prediction) = (&plan.schedule, segment.prediction);
            let at = Step {
                schedule,
                index,
                prediction,
                noise: &mut noise,
            };
            let mut predict = |input: &Latents, timestep: f64| {
                let output = denoiser.predict(input, timestep)?;
                let event = Event::ModelOutput {
                    step: index,
                    timestep,
                    output: &output,
                };
                self.notify(observer, event, index)?;
                Ok(output)
            };
            let stepped = scheduler.step(at, latents, &mut predict);
            latents = stepped.map_err(|e| at_step(e, index))?;
            check_finite(&latents, plan, index)?;
            let (done, total) = (index + 1, schedule.steps());
            self.notify(
                observer,
                Event::Step {
                    done,
                    total,
                    latents: &latents,
                },
                index,
            )?;
        }
        Ok(LatentHandoff {
            latents,
            next_step: steps.end,
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
