//! Schedules of the multistep solvers that keep latents as `α·x0 + s·ε`.
//!
//! Python twin: `set_timesteps` of diffusers' DPM-Solver, UniPC, DEIS and SA-Solver classes.

use crate::error::{Error, Result};
use crate::schedule::{
    Convention, Grid, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, SigmaRange,
    Spacing, Training, TrainingDefaults, Value, final_sigma, range, some_steps, to_f32,
};

/// What one class does differently from another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// The class's training defaults.
    pub training: TrainingDefaults,
    /// Whether it reads `timestep_spacing`; else its spacing is linspace.
    pub spaced: bool,
    /// Whether a cosine training table has its curve timesteps cut off instead of rounded.
    pub cuts_cosine: bool,
    /// Where its runs end.
    pub ending: Ending,
}

/// Where a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Where `final_sigmas_type` says: at zero or at the lowest level of training.
    Configured,
    /// The same, but a curve that does not end at zero ends at its own last level.
    ConfiguredOfCurve,
    /// Never at zero: at the lowest level of training, or at the curve's own last level.
    Lowest,
}

/// What a request may choose with every scheduler of the family that has a spacing; some offer more.
pub(super) const KNOBS: [Knob; 7] = [
    Knob::Spacing,
    Knob::Sigmas,
    Knob::SigmaRange,
    Knob::SigmasList,
    Knob::TimestepsList,
    Knob::LowerOrderFinal,
    Knob::Order,
];

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
    for key in ["use_flow_sigmas", "use_dynamic_shifting"] {
        config.refuse(key, "this engine does not have it")?;
    }
    config.only("lambda_min_clipped", &Value::Number(f64::NEG_INFINITY))?;
    config.only("variance_type", &Value::Null)?;
    let training = Training::new(config, family.training)?;
    let (timesteps, sigmas) = levels(config, options, &training, family)?;
    Ok(Schedule {
        timesteps,
        sigmas: to_f32(sigmas),
        init_noise_sigma: 1.0,
        prediction: config.prediction()?,
        convention: Convention::Preserving,
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
    let round = |curve: SigmaCurve, t: f64| {
        let cosine = family.cuts_cosine && training.is_cosine() && curve == SigmaCurve::Karras;
        let cut =
            matches!(curve, SigmaCurve::Exponential | SigmaCurve::Beta) && options.diffusers_quirks;
        if cosine || cut {
            t.trunc()
        } else {
            t.round_ties_even()
        }
    };
    if let Some(list) = &options.sigmas_list {
        let before = list[..options.steps].iter();
        let timesteps = before.map(|&sigma| round(SigmaCurve::Normal, training.timestep_of(sigma)));
        return Ok((timesteps.collect(), list.clone()));
    }
    let curve = curve_of(config, options)?;
    let (mut timesteps, mut sigmas) = (Vec::new(), Vec::new());
    let follows_grid = options.sigma_range == Some(SigmaRange::Spacing);
    if curve == SigmaCurve::Normal || follows_grid {
        timesteps = grid(config, options, training, family)?;
        sigmas = timesteps.iter().map(|&t| training.sigma_at(t)).collect();
    }
    let own = match (follows_grid, sigmas.first(), sigmas.last()) {
        (true, Some(&first), Some(&last)) => (first, last),
        _ => training.range(),
    };
    if let Some(levels) = curve.levels(range(config, own)?, options.steps) {
        few_enough(options.steps, training)?;
        let timestep = |sigma: &f64| round(curve, training.timestep_of(*sigma));
        timesteps = levels.iter().map(timestep).collect();
        sigmas = levels;
    }
    let of_curve = if curve.has_range() {
        sigmas.last().copied()
    } else {
        None
    };
    let lowest = f64::from(training.sigma(0));
    sigmas.push(match family.ending {
        Ending::Configured => final_sigma(config, training)?,
        Ending::ConfiguredOfCurve => {
            let configured = final_sigma(config, training)?;
            of_curve.filter(|_| configured > 0.0).unwrap_or(configured)
        }
        Ending::Lowest => of_curve.unwrap_or(lowest),
    });
    Ok((timesteps, sigmas))
}

/// The curve that the request or the configuration asks for. λ evenly spaced (`use_lu_lambdas`) is exponential σ.
fn curve_of(config: &SchedulerConfig, options: &SamplingOptions) -> Result<SigmaCurve> {
    if options.timesteps_list.is_some() {
        return Ok(SigmaCurve::Normal);
    }
    if options.sigmas.is_none() && config.flag("use_lu_lambdas", false)? {
        return Ok(SigmaCurve::Exponential);
    }
    options.curve(config)
}

/// The whole timesteps of the list or of the spacing.
fn grid(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    training: &Training,
    family: Family,
) -> Result<Vec<f64>> {
    if let Some(list) = &options.timesteps_list {
        return training.holding_whole(list).map(<[f64]>::to_vec);
    }
    let spacing = if family.spaced {
        config.spacing(Spacing::Linspace)?
    } else {
        Spacing::Linspace
    };
    let grid = Grid {
        train_steps: training.steps(),
        steps: options.steps,
        offset: config.count("steps_offset", 0, 0..=training.steps())?,
        open_end: true,
    };
    let timesteps = grid.timesteps(spacing)?;
    Ok(timesteps.into_iter().map(f64::round_ties_even).collect())
}

/// Refuses a curve of no steps, or of more steps than there are training timesteps.
fn few_enough(steps: usize, training: &Training) -> Result<()> {
    some_steps(steps, training.steps())?;
    if steps > training.steps() {
        let reason = format!("{steps} steps; choose at most {}", training.steps());
        return Err(Error::request("steps", reason));
    }
    Ok(())
}
