//! Euler's method with ancestral noise.
//!
//! Python twin: diffusers `EulerAncestralDiscreteScheduler`, which is k-diffusion's `sample_euler_ancestral` at η = 1.

use super::blend::{blend, denoised};
use super::exploding::{self, Family, ancestral};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
};
use crate::tensor::Latents;

/// A step goes down to below the next level and draws noise up to it. Latents are variance-exploding.
pub(super) struct EulerAncestral;

impl Rule for EulerAncestral {
    const CLASS: &'static str = "EulerAncestralDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &[
        Knob::Spacing,
        Knob::Sigmas,
        Knob::SigmaRange,
        Knob::SigmasList,
        Knob::TimestepsList,
        Knob::ZeroSnr,
    ];
    const ABOUT: About = About {
        paper: "Song et al. 2021, arXiv 2011.13456, appendix F; Karras et al. 2022",
        order: "1",
        calls: "n",
        noise: "every step, the last one too",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Floored),
            ends: false,
            interpolates: false,
            whole_karras: false,
            curved: false,
            wide: false,
        };
        exploding::plan(config, options, family)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for EulerAncestral {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let x0 = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        let (down, up) = ancestral(sigma, next);
        // Drawn at the last step too, where nothing of it is used: the generator must advance as diffusers' does.
        let noise = fresh(&mut at, &x);
        let keep = down / sigma;
        blend(&mut x, keep, [(1.0 - keep, &x0), (up, &noise)]);
        Ok(x)
    }
}
