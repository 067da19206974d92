//! DDIM, with noise as far as `eta` asks for it.
//!
//! Python twin: diffusers `DDIMScheduler`.

use super::blend::noise_of;
use super::discrete::{self, Ending, Family, arrival, clip};
use super::{About, Denoise, Rule, Scheduler, Step, blend::blend, fresh, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
    alpha_s,
};
use crate::tensor::Latents;

/// x0 and ε are re-mixed at a lower level. Latents are variance-preserving.
pub(super) struct Ddim {
    /// Bound on |x0|, where the configuration clips. The class clips unless told otherwise; every latent model tells it
    /// otherwise.
    clip: f64,
}

impl Rule for Ddim {
    const CLASS: &'static str = "DDIMScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];
    const KNOBS: &'static [Knob] = &[Knob::Spacing, Knob::Eta, Knob::ZeroSnr];
    const ABOUT: About = About {
        paper: "Song et al. 2021, arXiv 2010.02502, equation 12",
        order: "1",
        calls: "n",
        noise: "every step where eta is above 0",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        clip(config, true)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Exact),
            distilled: false,
            ending: Ending::Configured(true),
        };
        discrete::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        let clip = clip(&schedule.config, true)?;
        Ok(Self { clip })
    }
}

impl Scheduler for Ddim {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (sigma, _) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let (alpha, s) = alpha_s(sigma);
        let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
        // ε is never re-derived from a clipped x0 (`use_clipped_model_output=False`).
        let (c, d) = noise_of((alpha, s), at.prediction);
        let (to_alpha, to_s) = arrival(at.schedule, at.index);
        let ratio = alpha / to_alpha;
        let eta = at.schedule.options.eta.unwrap_or(0.0);
        let added = eta * to_s / s * (1.0 - ratio * ratio).max(0.0).sqrt();
        let kept = (to_s * to_s - added * added).max(0.0).sqrt();
        x.zip_mut_with(&output, |x, &m| {
            let (now, m) = (f64::from(*x), f64::from(m));
            let x0 = (a * now + b * m).clamp(-self.clip, self.clip);
            *x = (to_alpha * x0 + kept * (c * now + d * m)) as f32;
        });
        if eta > 0.0 {
            let noise = fresh(&mut at, &x);
            blend(&mut x, 1.0, [(added, &noise)]);
        }
        Ok(x)
    }
}
