//! Schedules of the schedulers that keep latents as `x0 + σ·ε`, and what their updates have in common.
//!
//! Python twin: `set_timesteps` and `init_noise_sigma` of diffusers' Euler, Heun, KDPM2, LMS and DPM-Solver SDE classes.

use super::Step;
use crate::error::Result;
use crate::schedule::{
    Convention, Grid, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, SigmaRange,
    Spacing, Training, TrainingDefaults, final_sigma, linspace_f32, range, to_f32,
};

/// What one class does differently from another.
#[allow(
    clippy::struct_excessive_bools,
    reason = "they are independent: diffusers' classes have them in most combinations"
)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// The class's training defaults.
    pub training: TrainingDefaults,
    /// Whether it reads `final_sigmas_type`; else it ends at zero.
    pub ends: bool,
    /// Whether it reads `interpolation_type`.
    pub interpolates: bool,
    /// Whether Karras timesteps are rounded to whole ones.
    pub whole_karras: bool,
    /// Whether it reads `use_karras_sigmas` and its siblings; a request may ask for a curve of any class.
    pub curved: bool,
    /// Whether a fractional grid stays f64.
    pub wide: bool,
}

/// What a request may choose with every scheduler of the family; some offer more.
pub(super) const KNOBS: &[Knob] = &[
    Knob::Spacing,
    Knob::Sigmas,
    Knob::SigmaRange,
    Knob::SigmasList,
    Knob::TimestepsList,
];

/// Plans a run.
pub(super) fn plan(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    family: Family,
) -> Result<Schedule> {
    let training = Training::new(config, family.training)?;
    let spacing = config.spacing(Spacing::Linspace)?;
    let (timesteps, sigmas) = levels(config, options, &training, family)?;
    let sigmas = to_f32(sigmas);
    let highest = sigmas[0];
    let init_noise_sigma = match spacing {
        Spacing::Leading => (highest * highest + 1.0).sqrt(),
        Spacing::Trailing | Spacing::Linspace => highest,
    };
    Ok(Schedule {
        timesteps: to_f32(timesteps),
        sigmas,
        init_noise_sigma,
        prediction: config.prediction()?,
        convention: Convention::Exploding,
        training,
        config: config.clone(),
        options: options.clone(),
    })
}

/// Timesteps, and sigmas with the one that the run ends at.
fn levels(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    training: &Training,
    family: Family,
) -> Result<(Vec<f64>, Vec<f64>)> {
    if let Some(list) = &options.sigmas_list {
        let before = &list[..options.steps];
        let timesteps = before.iter().map(|&sigma| training.timestep_of(sigma));
        return Ok((timesteps.collect(), list.clone()));
    }
    let mut timesteps = grid(config, options, training)?;
    if !family.wide {
        // diffusers rounds a fractional grid to f32 before it looks sigmas up.
        timesteps = to_f32(timesteps);
    }
    let closing = if family.ends {
        final_sigma(config, training)?
    } else {
        0.0
    };
    let mut sigmas = own_sigmas(config, training, family, &timesteps)?;
    let curve = match options.sigmas {
        Some(curve) => curve,
        None if family.curved && options.timesteps_list.is_none() => options.curve(config)?,
        None => SigmaCurve::Normal,
    };
    let own = match options.sigma_range.unwrap_or(SigmaRange::Spacing) {
        SigmaRange::Spacing => (sigmas[0], sigmas[sigmas.len() - 1]),
        SigmaRange::Table => training.range(),
    };
    if let Some(levels) = curve.levels(range(config, own)?, timesteps.len()) {
        let whole = family.whole_karras && curve == SigmaCurve::Karras;
        let timestep = |sigma: &f64| {
            let t = training.timestep_of(*sigma);
            if whole { t.round_ties_even() } else { t }
        };
        timesteps = levels.iter().map(timestep).collect();
        sigmas = levels;
    }
    // A log-linear interpolation brings its own last sigma.
    if sigmas.len() == timesteps.len() {
        sigmas.push(closing);
    }
    Ok((timesteps, sigmas))
}

/// The timesteps of the list or of the spacing.
fn grid(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    training: &Training,
) -> Result<Vec<f64>> {
    if let Some(list) = &options.timesteps_list {
        return training.holding(list).map(<[f64]>::to_vec);
    }
    let grid = Grid {
        train_steps: training.steps(),
        steps: options.steps,
        offset: config.count("steps_offset", 0, 0..=training.steps())?,
        open_end: false,
    };
    grid.timesteps(config.spacing(Spacing::Linspace)?)
}

/// The sigmas that go with timesteps.
fn own_sigmas(
    config: &SchedulerConfig,
    training: &Training,
    family: Family,
    timesteps: &[f64],
) -> Result<Vec<f64>> {
    let kinds = [("linear", false), ("log_linear", true)];
    if family.interpolates && config.one_of("interpolation_type", &kinds, false)? {
        let last = training.steps() - 1;
        let log = |timestep| f64::from(training.sigma(timestep)).ln();
        let levels = linspace_f32(log(last), log(0), timesteps.len() + 1);
        return Ok(levels.into_iter().map(|x| f64::from(x).exp()).collect());
    }
    Ok(timesteps.iter().map(|&t| training.sigma_at(t)).collect())
}

/// σ and timestep of a level between two steps.
pub(super) fn between(at: &Step<'_>, sigma: f64) -> (f64, f64) {
    (sigma, at.schedule.training.timestep_of(sigma))
}

/// The geometric mean of two levels; zero where one of them is.
pub(super) fn middle(sigma: f64, next: f64) -> f64 {
    (sigma * next).sqrt()
}

/// `(down, up)`: the level that a step goes down to, and the noise that lifts it to `next` again.
pub(super) fn ancestral(sigma: f64, next: f64) -> (f64, f64) {
    let up = next * ((sigma * sigma - next * next).max(0.0)).sqrt() / sigma;
    let up = up.min(next);
    ((next * next - up * up).max(0.0).sqrt(), up)
}
