//! Heun's method without churn.
//!
//! Python twin: diffusers `HeunDiscreteScheduler`.

use super::blend::{blend, denoised};
use super::discrete::clip;
use super::exploding::{self, Family};
use super::{About, Denoise, Rule, Scheduler, Step, predict, predict_at};
use crate::error::Result;
use crate::schedule::{
    BetaCurve, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults,
    ZeroSnr,
};
use crate::tensor::Latents;

/// The slope of a step is the mean of those at its two ends. Latents are variance-exploding.
pub(super) struct Heun {
    /// Bound on |x0|, where the configuration clips.
    clip: f64,
}

/// What the second-order classes share.
pub(super) const FAMILY: Family = Family {
    training: TrainingDefaults::stable_diffusion(BetaCurve::Linear, ZeroSnr::Unknown),
    ends: false,
    interpolates: false,
    whole_karras: false,
    curved: true,
    wide: false,
};

impl Rule for Heun {
    const CLASS: &'static str = "HeunDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = exploding::KNOBS;
    const ABOUT: About = About {
        paper: "Karras et al. 2022, arXiv 2206.00364, algorithm 1",
        order: "2",
        calls: "2n - 1",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        clip(config, false)?;
        exploding::plan(config, options, FAMILY)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        let clip = clip(&schedule.config, false)?;
        Ok(Self { clip })
    }
}

impl Scheduler for Heun {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let x0 = denoised(&at, sigma, &x, output, self.clip)?;
        let keep = next / sigma;
        let mut end = x.clone();
        blend(&mut end, keep, [(1.0 - keep, &x0)]);
        // The timestep after the last step's does not exist, and at zero there is no slope.
        let Some(&timestep) = at
            .schedule
            .timesteps
            .get(at.index + 1)
            .filter(|_| next > 0.0)
        else {
            return Ok(end);
        };
        let output = predict_at(&at, (next, timestep), &end, denoise)?;
        let end0 = denoised(&at, next, &end, output, self.clip)?;
        // x + ½(σ' − σ)·((x − x0)/σ + (x' − x0')/σ')
        let half = (next - sigma) / 2.0;
        let (here, there) = (half / sigma, half / next);
        let terms = [(-here, &x0), (there, &end), (-there, &end0)];
        blend(&mut x, 1.0 + here, terms);
        Ok(x)
    }
}
