//! Euler's method for networks with EDM preconditioning, such as `CosXL`; and how such networks' runs are planned.
//!
//! Python twin: diffusers `EDMEulerScheduler` without churn.

use super::euler::Euler;
use super::{About, Denoise, Rule, Scheduler, Step};
use crate::error::{Error, Result};
use crate::schedule::{
    Convention, FinalSigma, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Training,
    karras, linspace_f32, range, some_steps, to_f32, unusable,
};
use crate::tensor::Latents;

/// Latents are variance-exploding, networks preconditioned.
pub(super) struct EdmEuler;

/// The curves of both EDM classes, under the names of `sigma_schedule`.
pub(super) const CURVES: &[SigmaCurve] = &[SigmaCurve::Karras, SigmaCurve::Exponential];

/// Most steps, to keep slips of the keyboard from becoming lists of a billion levels.
const MAX_STEPS: usize = 10_000;

impl Rule for EdmEuler {
    const CLASS: &'static str = "EDMEulerScheduler";
    const CURVES: &'static [SigmaCurve] = CURVES;
    const KNOBS: &'static [Knob] = &[Knob::Sigmas, Knob::SigmasList, Knob::FinalSigma];
    const ABOUT: About = About {
        paper: "Karras et al. 2022, arXiv 2206.00364, algorithm 1 and table 1",
        order: "1",
        calls: "n",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        plan(config, options)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for EdmEuler {
    fn step(&mut self, at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        Euler.step(at, x, denoise)
    }
}

/// σ from highest to lowest, even in ln σ, counted in f32 from the lowest as torch counts.
///
/// One step is at the highest level. (In diffusers it is at the lowest, which paints nothing.)
fn exponential_f32(highest: f64, lowest: f64, steps: usize) -> Vec<f64> {
    if steps < 2 {
        return vec![highest; steps];
    }
    let levels = linspace_f32(lowest.ln(), highest.ln(), steps);
    levels
        .into_iter()
        .rev()
        .map(|x| f64::from(x.exp()))
        .collect()
}

/// Plans a run of either EDM class.
pub(super) fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
    let data = config.number("sigma_data")?.unwrap_or(0.5);
    if data <= 0.0 {
        return Err(unusable("sigma_data", &data.into(), "above 0"));
    }
    let (highest, lowest) = range(config, (80.0, 0.002))?;
    let rho = config.number("rho")?.unwrap_or(7.0);
    if rho <= 0.0 {
        return Err(unusable("rho", &rho.into(), "above 0"));
    }
    some_steps(options.steps, MAX_STEPS)?;
    if options.steps > MAX_STEPS {
        let reason = format!("{} steps; choose at most {MAX_STEPS}", options.steps);
        return Err(Error::request("steps", reason));
    }
    let names = CURVES.iter().map(|curve| (curve.name(), *curve));
    let names: Vec<_> = names.collect();
    let own = config.one_of("sigma_schedule", &names, SigmaCurve::Karras)?;
    let curve = options.sigmas.unwrap_or(own);
    let levels = |steps| match curve {
        SigmaCurve::Exponential => exponential_f32(highest, lowest, steps),
        _ => karras(highest, lowest, steps, rho),
    };
    let ends = [
        ("zero", FinalSigma::Zero),
        ("sigma_min", FinalSigma::SigmaMin),
    ];
    let sigmas = if let Some(list) = &options.sigmas_list {
        list.clone()
    } else {
        let mut sigmas = levels(options.steps);
        sigmas.push(
            match config.one_of("final_sigmas_type", &ends, FinalSigma::Zero)? {
                FinalSigma::Zero => 0.0,
                FinalSigma::SigmaMin => sigmas[options.steps - 1],
            },
        );
        sigmas
    };
    let sigmas = to_f32(sigmas);
    let timesteps = sigmas[..options.steps].iter().map(|s| 0.25 * s.ln());
    let table = config.count("num_train_timesteps", 1000, 2..=100_000)?;
    Ok(Schedule {
        timesteps: to_f32(timesteps),
        init_noise_sigma: (highest * highest + 1.0).sqrt(),
        prediction: config.prediction()?,
        convention: Convention::Preconditioned { data },
        training: Training::of_sigmas(levels(table).into_iter().rev()),
        config: config.clone(),
        options: options.clone(),
        sigmas,
    })
}
