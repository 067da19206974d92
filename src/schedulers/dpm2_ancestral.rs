//! DPM-Solver-2 with ancestral noise.
//!
//! Python twin: diffusers `KDPM2AncestralDiscreteScheduler`, k-diffusion's `sample_dpm_2_ancestral` at η = 1.

use super::blend::blend;
use super::exploding::{self, ancestral};
use super::{About, Denoise, Rule, Scheduler, Step, dpm2, fresh};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::tensor::Latents;

/// A step goes down to below the next level and draws noise up to it. Latents are variance-exploding.
pub(super) struct Dpm2Ancestral;

impl Rule for Dpm2Ancestral {
    const CLASS: &'static str = "KDPM2AncestralDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = exploding::KNOBS;
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2206.00927; Song et al. 2021, arXiv 2011.13456, appendix F",
        order: "2",
        calls: "2n - 1",
        noise: "every step but the last",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        exploding::plan(config, options, dpm2::FAMILY)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for Dpm2Ancestral {
    fn step(&mut self, mut at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let (down, up) = ancestral(sigma, next);
        let mut x = dpm2::through_the_middle(&at, x, down, denoise)?;
        if next > 0.0 {
            let noise = fresh(&mut at, &x);
            blend(&mut x, 1.0, [(up, &noise)]);
        }
        Ok(x)
    }
}
