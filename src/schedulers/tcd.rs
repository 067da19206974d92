//! Sampling of trajectory consistency models.
//!
//! Python twin: diffusers `TCDScheduler`.

use super::blend::{blend, noise_of};
use super::discrete::{self, Ending, Family, sigma};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, lcm, predict};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, alpha_s};
use crate::tensor::Latents;

/// A step goes down to below the next level, the lower the more `eta`, and draws noise up to it. Latents are
/// variance-preserving.
pub(super) struct Tcd;

/// γ of the paper, where the request does not say (`eta` of diffusers' `step`).
const ETA: f64 = 0.3;

impl Rule for Tcd {
    const CLASS: &'static str = "TCDScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];
    const KNOBS: &'static [Knob] = &[Knob::TimestepsList, Knob::Eta, Knob::ZeroSnr];
    const ABOUT: About = About {
        paper: "Zheng et al. 2024, arXiv 2402.19159, algorithm 4",
        order: "-",
        calls: "n",
        noise: "every step but the last where eta is above 0",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        let family = Family {
            training: lcm::TRAINING,
            distilled: true,
            ending: Ending::Lowest,
        };
        discrete::plan(config, options, family)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for Tcd {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (level, next) = at.schedule.levels(at.index)?;
        let eta = at.schedule.options.eta.unwrap_or(ETA);
        let following = at.schedule.timesteps.get(at.index + 1).copied();
        // f32, as in diffusers: a floor is a matter of the last digit.
        let below = ((1.0 - eta) as f32 * following.unwrap_or(0.0) as f32).floor();
        let (to_alpha, to_s) = alpha_s(sigma(&at.schedule.training, below as usize));
        let output = predict(&at, &x, denoise)?;
        let (a, b) = at.schedule.denoised(level, at.prediction)?;
        let (c, d) = noise_of(alpha_s(level), at.prediction);
        let (keep, add) = (to_alpha * a + to_s * c, to_alpha * b + to_s * d);
        if eta == 0.0 || following.is_none() {
            blend(&mut x, keep, [(add, &output)]);
            return Ok(x);
        }
        let share = alpha_s(next).0 / to_alpha;
        let noise = fresh(&mut at, &x);
        let lift = (1.0 - share * share).max(0.0).sqrt();
        blend(
            &mut x,
            share * keep,
            [(share * add, &output), (lift, &noise)],
        );
        Ok(x)
    }
}
