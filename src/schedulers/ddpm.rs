//! Ancestral sampling of the Markov chain that the network was trained on.
//!
//! Python twin: diffusers `DDPMScheduler`.

use super::blend::{blend, denoised};
use super::discrete::{self, Ending, Family, clip};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
    alpha_s,
};
use crate::tensor::Latents;

/// A step samples the chain's posterior, given the denoised latents. Latents are variance-preserving.
pub(super) struct Ddpm {
    /// Bound on |x0|, where the configuration clips.
    clip: f64,
    /// Whether the noise has the chain's own variance instead of its posterior's.
    large: bool,
}

impl Ddpm {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        let variances = [
            ("fixed_small", false),
            ("fixed_small_log", false),
            ("fixed_large", true),
        ];
        Ok(Self {
            clip: clip(config, true)?,
            large: config.one_of("variance_type", &variances, false)?,
        })
    }
}

impl Rule for Ddpm {
    const CLASS: &'static str = "DDPMScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];
    const KNOBS: &'static [Knob] = &[Knob::Spacing, Knob::TimestepsList, Knob::ZeroSnr];
    const ABOUT: About = About {
        paper: "Ho et al. 2020, arXiv 2006.11239, equations 6 and 7",
        order: "1",
        calls: "n",
        noise: "every step but one at timestep 0",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Exact),
            distilled: false,
            ending: Ending::Clean,
        };
        discrete::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

/// The least variance of the posterior, against a logarithm of 0 in diffusers.
const LEAST_VARIANCE: f64 = 1e-20;

impl Scheduler for Ddpm {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let x0 = denoised(&at, sigma, &x, output, self.clip)?;
        let ((alpha, s), (to_alpha, to_s)) = (alpha_s(sigma), alpha_s(next));
        let ratio = alpha / to_alpha;
        // The variance that the chain adds from the next level to this one.
        let step = 1.0 - ratio * ratio;
        let (left, here) = (to_s * to_s, s * s);
        let (data, keep) = (to_alpha * step / here, ratio * left / here);
        if at.schedule.timesteps[at.index] == 0.0 {
            blend(&mut x, keep, [(data, &x0)]);
            return Ok(x);
        }
        let variance = if self.large {
            step
        } else {
            (left / here * step).max(LEAST_VARIANCE)
        };
        let noise = fresh(&mut at, &x);
        blend(&mut x, keep, [(data, &x0), (variance.sqrt(), &noise)]);
        Ok(x)
    }
}
