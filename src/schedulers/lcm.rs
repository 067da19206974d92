//! Sampling of latent consistency models, and of models with an LCM adapter.
//!
//! Python twin: diffusers `LCMScheduler`.

use super::blend::{blend, denoised};
use super::discrete::{self, Ending, Family, clip};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, predict};
use crate::error::Result;
use crate::schedule::{
    BetaCurve, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults,
    ZeroSnr, alpha_s,
};
use crate::tensor::Latents;

/// The network's answer is the end of the path; a step draws noise up to the next level. Latents are
/// variance-preserving.
pub(super) struct Lcm {
    /// Bound on |x0|, where the configuration clips.
    clip: f64,
    /// What timesteps are multiplied with in the boundary condition.
    scaling: f64,
}

/// Deviation of the data in the boundary condition.
const DATA: f64 = 0.5;

/// What the classes of distilled models assume of their training.
pub(super) const TRAINING: TrainingDefaults =
    TrainingDefaults::stable_diffusion(BetaCurve::ScaledLinear, ZeroSnr::Exact);

impl Lcm {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        Ok(Self {
            clip: clip(config, false)?,
            scaling: config.number("timestep_scaling")?.unwrap_or(10.0),
        })
    }
}

impl Rule for Lcm {
    const CLASS: &'static str = "LCMScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];
    const KNOBS: &'static [Knob] = &[Knob::TimestepsList, Knob::ZeroSnr];
    const ABOUT: About = About {
        paper: "Luo et al. 2023, arXiv 2310.04378, algorithm 3",
        order: "-",
        calls: "n",
        noise: "every step but the last",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        let family = Family {
            training: TRAINING,
            distilled: true,
            ending: Ending::Clean,
        };
        discrete::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

impl Scheduler for Lcm {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let x0 = denoised(&at, sigma, &x, output, self.clip)?;
        let scaled = at.schedule.timesteps[at.index] * self.scaling;
        let norm = scaled * scaled + DATA * DATA;
        let (skip, out) = (DATA * DATA / norm, scaled / norm.sqrt());
        if at.index + 1 == at.schedule.steps() {
            blend(&mut x, skip, [(out, &x0)]);
            return Ok(x);
        }
        let (alpha, s) = alpha_s(next);
        let noise = fresh(&mut at, &x);
        blend(&mut x, alpha * skip, [(alpha * out, &x0), (s, &noise)]);
        Ok(x)
    }
}
