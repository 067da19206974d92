//! DPM-Solver-2: the midpoint method in ln σ.
//!
//! Python twin: diffusers `KDPM2DiscreteScheduler`, k-diffusion's `sample_dpm_2` without churn.

use super::blend::{blend, denoised};
use super::exploding::{self, Family, between, middle};
use super::{About, Denoise, Rule, Scheduler, Step, heun, predict, predict_at};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::tensor::Latents;

/// The slope of a step is that in its middle. Latents are variance-exploding.
pub(super) struct Dpm2;

/// What both DPM-Solver-2 classes share.
pub(super) const FAMILY: Family = Family {
    whole_karras: true,
    ..heun::FAMILY
};

impl Rule for Dpm2 {
    const CLASS: &'static str = "KDPM2DiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = exploding::KNOBS;
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2206.00927, algorithm 1; Karras et al. 2022",
        order: "2",
        calls: "2n - 1",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        exploding::plan(config, options, FAMILY)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for Dpm2 {
    fn step(&mut self, at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (_, next) = at.schedule.levels(at.index)?;
        through_the_middle(&at, x, next, denoise)
    }
}

/// Takes latents down to σ = `target`, with the slope halfway in ln σ; in one straight line to zero.
pub(super) fn through_the_middle(
    at: &Step<'_>,
    mut x: Latents,
    target: f64,
    denoise: &mut Denoise<'_>,
) -> Result<Latents> {
    let (sigma, _) = at.schedule.levels(at.index)?;
    let output = predict(at, &x, denoise)?;
    let x0 = denoised(at, sigma, &x, output, f64::INFINITY)?;
    let middle = middle(sigma, target);
    let keep = middle / sigma;
    if middle == 0.0 {
        return Ok(x0);
    }
    let mut halfway = x.clone();
    blend(&mut halfway, keep, [(1.0 - keep, &x0)]);
    let output = predict_at(at, between(at, middle), &halfway, denoise)?;
    let halfway0 = denoised(at, middle, &halfway, output, f64::INFINITY)?;
    let slope = (target - sigma) / middle;
    blend(&mut x, 1.0, [(slope, &halfway), (-slope, &halfway0)]);
    Ok(x)
}
