//! Schedules of the schedulers that look noise levels up by whole timesteps. Latents are variance-preserving.
//!
//! Python twin: `set_timesteps` of diffusers' DDIM, DDPM, PNDM, LCM and TCD classes.

use crate::error::{Error, Result};
use crate::schedule::{
    Convention, Grid, Prediction, SamplingOptions, Schedule, SchedulerConfig, Spacing, Training,
    TrainingDefaults, alpha_s, some_steps,
};

/// What one class does differently from another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// The class's training defaults.
    pub training: TrainingDefaults,
    /// Whether timesteps are a part of those that a few-step model was distilled on (`original_inference_steps`); else
    /// they are spaced.
    pub distilled: bool,
    /// Where runs end.
    pub ending: Ending,
}

/// Where a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Without noise.
    Clean,
    /// At the first training timestep.
    Lowest,
    /// Where `set_alpha_to_one` says, with the class's default.
    Configured(bool),
}

/// Plans a run.
pub(super) fn plan(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    family: Family,
) -> Result<Schedule> {
    config.refuse(
        "thresholding",
        "dynamic thresholding suits pixels, not latents",
    )?;
    let training = Training::new(config, family.training)?;
    let timesteps = match &options.timesteps_list {
        Some(list) => training.holding_whole(list)?.to_vec(),
        None if family.distilled => distilled(config, options.steps, training.steps())?,
        None => spaced(config, options.steps, training.steps())?,
    };
    let clean = match family.ending {
        Ending::Clean => true,
        Ending::Lowest => false,
        Ending::Configured(default) => config.flag("set_alpha_to_one", default)?,
    };
    let closing = if clean { 0.0 } else { sigma(&training, 0) };
    let sigmas = timesteps.iter().map(|&t| sigma(&training, t as usize));
    Ok(Schedule {
        sigmas: sigmas.chain([closing]).collect(),
        timesteps,
        init_noise_sigma: 1.0,
        prediction: config.prediction()?,
        convention: Convention::Preserving,
        training,
        config: config.clone(),
        options: options.clone(),
    })
}

fn spaced(config: &SchedulerConfig, steps: usize, train_steps: usize) -> Result<Vec<f64>> {
    let grid = Grid {
        train_steps,
        steps,
        offset: config.count("steps_offset", 0, 0..=train_steps)?,
        open_end: false,
    };
    let timesteps = grid.timesteps(config.spacing(Spacing::Leading)?)?;
    Ok(timesteps.into_iter().map(f64::round_ties_even).collect())
}

/// An even part of the timesteps that distillation used, from the highest.
fn distilled(config: &SchedulerConfig, steps: usize, train_steps: usize) -> Result<Vec<f64>> {
    let original = config.count("original_inference_steps", 50, 1..=train_steps)?;
    some_steps(steps, original)?;
    if steps > original {
        let reason = format!(
            "{steps} steps of a model that was distilled on {original}; choose at most {original}"
        );
        return Err(Error::request("steps", reason));
    }
    let stride = train_steps / original;
    let skip = original as f64 / steps as f64;
    let place = |i: usize| (i as f64 * skip).floor() as usize;
    Ok((0..steps)
        .map(|i| ((original - place(i)) * stride - 1) as f64)
        .collect())
}

/// σ of a training timestep without the rounding of the f32 table; infinite where no signal is left.
pub(super) fn sigma(training: &Training, timestep: usize) -> f64 {
    let alpha = training.alpha_cumprod(timestep).unwrap_or_default();
    f64::sqrt((1.0 - alpha) / alpha)
}

/// Bound on |x0| where the configuration clips, infinite elsewhere.
pub(super) fn clip(config: &SchedulerConfig, default: bool) -> Result<f64> {
    let range = config.number("clip_sample_range")?.unwrap_or(1.0);
    Ok(if config.flag("clip_sample", default)? {
        range.abs()
    } else {
        f64::INFINITY
    })
}

/// `(α, s)` of the level that a step of DDIM or PNDM arrives at.
///
/// The next step's own. diffusers takes timestep `t − T//n` whatever the spacing, which is the next one with leading
/// spacing, off by up to one with trailing, and quite another with linspace.
pub(super) fn arrival(schedule: &Schedule, index: usize) -> (f64, f64) {
    let next = schedule.sigmas[index + 1];
    if !schedule.options.diffusers_quirks {
        return alpha_s(next);
    }
    let stride = schedule.training.steps() / schedule.steps();
    let closing = schedule.sigmas[schedule.steps()];
    let previous = (schedule.timesteps[index] as usize).checked_sub(stride);
    alpha_s(previous.map_or(closing, |timestep| sigma(&schedule.training, timestep)))
}

/// Refuses a network that predicts x0 at a level where x0 alone says nothing of the noise, or where `sample` is not known.
pub(super) fn no_sample(prediction: Prediction, class: &str) -> Result<()> {
    if prediction == Prediction::Sample {
        let reason = format!(
            "prediction_type \"sample\" is not one that {class} knows; supported: \"epsilon\", \"v_prediction\""
        );
        return Err(Error::request("scheduler", reason));
    }
    Ok(())
}
