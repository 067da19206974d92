//! DDIM without added noise.
//!
//! Python twin: diffusers `DDIMScheduler` at `eta=0`.

use super::{Denoise, Rule, Scheduler, Step, predict};
use crate::error::Result;
use crate::schedule::{
    BetaCurve, Convention, Grid, Prediction, SamplingOptions, Schedule, SchedulerConfig,
    SigmaCurve, Spacing, Training, TrainingDefaults, ZeroSnr, alpha_s,
};
use crate::tensor::Latents;

/// x0 and ε are re-mixed at the level of timestep `t − T//n`. Latents are variance-preserving.
pub(super) struct Ddim {
    /// Bound on |x0|, where the configuration clips.
    clip: f64,
}

impl Ddim {
    /// The rule's own options. The class clips unless told otherwise; every latent model tells it otherwise.
    fn options(config: &SchedulerConfig) -> Result<Self> {
        config.refuse(
            "thresholding",
            "dynamic thresholding suits pixels, not latents",
        )?;
        let range = config.number("clip_sample_range")?.unwrap_or(1.0);
        let clip = if config.flag("clip_sample", true)? {
            range.abs()
        } else {
            f64::INFINITY
        };
        Ok(Self { clip })
    }
}

impl Rule for Ddim {
    const CLASS: &'static str = "DDIMScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        let training = Training::new(
            config,
            TrainingDefaults {
                start: 0.0001,
                end: 0.02,
                curve: BetaCurve::Linear,
                zero_snr: ZeroSnr::Exact,
            },
        )?;
        Self::options(config)?;
        let grid = Grid {
            train_steps: training.steps(),
            steps: options.steps,
            offset: config.count("steps_offset", 0, 0..=training.steps())?,
            open_end: false,
        };
        let spacing = options.spacing(config, Spacing::Leading)?;
        let timesteps: Vec<f64> = grid
            .timesteps(spacing)?
            .into_iter()
            .map(f64::round_ties_even)
            .collect();
        let closing = if config.flag("set_alpha_to_one", true)? {
            0.0
        } else {
            sigma(&training, 0)
        };
        let sigmas = timesteps
            .iter()
            .map(|&t| sigma(&training, t as usize))
            .chain([closing])
            .collect();
        Ok(Schedule {
            timesteps,
            sigmas,
            init_noise_sigma: 1.0,
            prediction: config.prediction()?,
            convention: Convention::Preserving,
            training,
            config: config.clone(),
        })
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

/// σ of a training timestep without the rounding of the f32 table; infinite where no signal is left.
fn sigma(training: &Training, timestep: usize) -> f64 {
    let alpha = training.alpha_cumprod(timestep).unwrap_or_default();
    f64::sqrt((1.0 - alpha) / alpha)
}

/// The level that a step arrives at: that of timestep `t − T//n` whatever the spacing, as diffusers does, so that with
/// linspace or an uneven trailing grid it is not quite the next step's own level.
fn arrival(schedule: &Schedule, index: usize) -> (f64, f64) {
    let stride = schedule.training.steps() / schedule.steps();
    let closing = schedule.sigmas[schedule.steps()];
    let previous = (schedule.timesteps[index] as usize).checked_sub(stride);
    alpha_s(previous.map_or(closing, |timestep| sigma(&schedule.training, timestep)))
}

impl Scheduler for Ddim {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, _) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let (alpha, s) = alpha_s(sigma);
        let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
        // ε = c·x + d·output, never re-derived from a clipped x0 (`use_clipped_model_output=False`).
        let (c, d) = match at.prediction {
            Prediction::Epsilon => (0.0, 1.0),
            Prediction::VPrediction => (s, alpha),
            Prediction::Sample => (1.0 / s, -alpha / s),
        };
        let (to_alpha, to_s) = arrival(at.schedule, at.index);
        x.zip_mut_with(&output, |x, &m| {
            let (now, m) = (f64::from(*x), f64::from(m));
            let x0 = (a * now + b * m).clamp(-self.clip, self.clip);
            *x = (to_alpha * x0 + to_s * (c * now + d * m)) as f32;
        });
        Ok(x)
    }
}
