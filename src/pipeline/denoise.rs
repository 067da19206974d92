//! The loop: segment by segment, step by step.

use std::ops::Range;

use super::Pipeline;
use super::guidance::Denoiser;
use super::handoff::LatentHandoff;
use crate::error::{Error, Result};
use crate::plan::{Plan, Segment, names};
use crate::progress::{Control, Event, Observer, Stage};
use crate::schedulers::Step;
use crate::tensor::Latents;

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
            if !steps.is_empty() {
                state = self.segment(plan, segment, steps, state, observer)?;
            }
        }
        Ok(state)
    }

    fn segment(
        &self,
        plan: &Plan,
        segment: &Segment,
        steps: Range<usize>,
        from: LatentHandoff,
        observer: &mut Observer<'_>,
    ) -> Result<LatentHandoff> {
        let LatentHandoff {
            mut latents,
            mut noise,
            history,
            ..
        } = from;
        let mut unet = self.session(&segment.model, names::UNET, observer)?;
        let batch = latents.dim().0;
        let mut denoiser = Denoiser::new(&mut unet, &segment.conditioning, plan.guidance, batch)?;
        plan.schedule.accepts(segment.prediction)?;
        let mut scheduler = plan.scheduler.start(&plan.schedule)?;
        // A segment starts afresh; only a run that was stopped inside one has a history to go on with.
        if steps.start > segment.steps.start {
            scheduler.restore(history)?;
        }
        self.notify(
            observer,
            Event::Stage {
                stage: Stage::Denoise,
                what: &segment.model,
            },
            steps.start,
        )?;
        for index in steps.clone() {
            let at = Step {
                schedule: &plan.schedule,
                index,
                prediction: segment.prediction,
                noise: &mut noise,
            };
            let mut predict = |input: &Latents, timestep: f64| {
                let output = denoiser.predict(input, timestep)?;
                self.notify(
                    observer,
                    Event::ModelOutput {
                        step: index,
                        timestep,
                        output: &output,
                    },
                    index,
                )?;
                Ok(output)
            };
            latents = scheduler
                .step(at, latents, &mut predict)
                .map_err(|e| at_step(e, index))?;
            let event = Event::Step {
                done: index + 1,
                total: plan.schedule.steps(),
                latents: &latents,
            };
            self.notify(observer, event, index)?;
        }
        Ok(LatentHandoff {
            latents,
            next_step: steps.end,
            noise,
            history: scheduler.history(),
        })
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
