//! What a run costs: how often its steps call the network.

use std::ops::Range;

use super::{SchedulerKind, Step};
use crate::error::Result;
use crate::noise::Noise;
use crate::schedule::Schedule;
use crate::tensor::Latents;

impl SchedulerKind {
    /// How often each of `steps` calls the network when the rule starts afresh at the first of them: counted while it
    /// takes these steps on a latent of one value.
    ///
    /// # Errors
    /// Those of [`SchedulerKind::start`]; [`crate::Error::Request`] when the schedule lacks a step.
    pub fn calls(self, schedule: &Schedule, steps: Range<usize>) -> Result<Vec<usize>> {
        let mut rule = self.start(schedule)?;
        let mut noise = Noise::new(0);
        let mut count = |index| {
            let mut calls = 0;
            let at = Step {
                schedule,
                index,
                prediction: schedule.prediction,
                noise: &mut noise,
            };
            rule.step(at, Latents::zeros((1, 1, 1, 1)), &mut |x, _| {
                calls += 1;
                Ok(Latents::zeros(x.raw_dim()))
            })?;
            Ok(calls)
        };
        steps.map(&mut count).collect()
    }
}
