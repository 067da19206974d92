//! Which training timesteps a run visits: leading, trailing and linspace grids, and lists of one's own.
//!
//! Python twin: the first half of `set_timesteps` of diffusers' schedulers.

use super::Spacing;
use crate::error::{Error, Result};

/// How a scheduler lays its grid of timesteps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Number of training timesteps.
    pub train_steps: usize,
    /// Number of steps asked for.
    pub steps: usize,
    /// `steps_offset`, which only leading spacing adds.
    pub offset: usize,
    /// Lays leading and linspace grids for one step more and drops the lowest (the multistep solvers).
    pub open_end: bool,
}

impl Grid {
    /// The timesteps, falling; a linspace grid may be fractional.
    ///
    /// Trailing takes exactly `steps` points: `numpy.arange` in diffusers yields one more, at −1, for 61, 103, 121 and
    /// other step counts.
    pub(crate) fn timesteps(&self, spacing: Spacing) -> Result<Vec<f64>> {
        self.check(spacing)?;
        let (train, points) = (self.train_steps as f64, self.points());
        let values: Vec<f64> = match spacing {
            Spacing::Leading => {
                let ratio = self.train_steps / points;
                (0..points)
                    .rev()
                    .map(|i| (i * ratio + self.offset) as f64)
                    .collect()
            }
            Spacing::Linspace => linspace(0.0, train - 1.0, points)
                .into_iter()
                .rev()
                .collect(),
            Spacing::Trailing => {
                // numpy.arange measures its step between its first two values; ties of the rounding depend on it.
                let step = (train - train / self.steps as f64) - train;
                (0..self.steps)
                    .map(|i| (train + i as f64 * step).round_ties_even() - 1.0)
                    .collect()
            }
        };
        Ok(values.into_iter().take(self.steps).collect())
    }

    fn points(&self) -> usize {
        self.steps + usize::from(self.open_end)
    }

    /// Whether every timestep of the grid is a different one inside the training table.
    fn fits(&self, spacing: Spacing) -> bool {
        let points = self.points();
        let highest = match spacing {
            Spacing::Leading if points <= self.train_steps => {
                (points - 1) * (self.train_steps / points) + self.offset
            }
            Spacing::Trailing => self.steps - 1,
            _ => points - 1,
        };
        self.steps >= 1 && highest < self.train_steps
    }

    fn check(&self, spacing: Spacing) -> Result<()> {
        some_steps(self.steps, self.train_steps)?;
        if self.fits(spacing) {
            return Ok(());
        }
        let most = (1..self.steps.min(self.train_steps + 1))
            .rev()
            .find(|&steps| Self { steps, ..*self }.fits(spacing));
        let allowed = match most {
            Some(most) => format!("choose at most {most}"),
            None => "no number of steps fits; choose another spacing".to_owned(),
        };
        let reason = format!(
            "{} steps with {spacing} spacing and steps_offset {} leave the {} training timesteps; {allowed}",
            self.steps, self.offset, self.train_steps
        );
        Err(Error::request("steps", reason))
    }
}

/// Refuses a run without steps.
pub(crate) fn some_steps(steps: usize, most: usize) -> Result<()> {
    if steps == 0 {
        let reason = format!("0 steps; choose 1 to {most}");
        return Err(Error::request("steps", reason));
    }
    Ok(())
}

/// `numpy.linspace`: the last value is exact.
pub(crate) fn linspace(start: f64, end: f64, points: usize) -> Vec<f64> {
    let last = points.saturating_sub(1);
    let step = (end - start) / last as f64;
    (0..points)
        .map(|i| {
            if i == last && i > 0 {
                end
            } else if i == 0 {
                start
            } else {
                i as f64 * step + start
            }
        })
        .collect()
}
