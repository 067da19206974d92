//! Euler's method without churn.
//!
//! Python twin: diffusers `EulerDiscreteScheduler`.

use super::{Denoise, Rule, Scheduler, Step, predict};
use crate::error::Result;
use crate::schedule::{
    BetaCurve, Convention, Grid, Prediction, SamplingOptions, Schedule, SchedulerConfig,
    SigmaCurve, Spacing, Training, TrainingDefaults, Value, ZeroSnr, final_sigma, karras,
    linspace_f32, to_f32, unusable,
};
use crate::tensor::Latents;

/// x moves along `dx/dσ = (x − x0)/σ`, one straight line a step. Latents are variance-exploding.
pub(super) struct Euler;

impl Rule for Euler {
    const CLASS: &'static str = "EulerDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal, SigmaCurve::Karras];

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        let training = Training::new(
            config,
            TrainingDefaults {
                start: 0.0001,
                end: 0.02,
                curve: BetaCurve::Linear,
                zero_snr: ZeroSnr::Floored,
            },
        )?;
        let prediction = config.prediction()?;
        if prediction == Prediction::VPrediction {
            config.only("timestep_type", &Value::from("discrete"))?;
        }
        let spacing = options.spacing(config, Spacing::Linspace)?;
        let grid = Grid {
            train_steps: training.steps(),
            steps: options.steps,
            offset: config.count("steps_offset", 0, 0..=training.steps())?,
            open_end: false,
        };
        let (timesteps, sigmas) = levels(config, options, &training, grid.timesteps(spacing)?)?;
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
            prediction,
            convention: Convention::Exploding,
            training,
            config: config.clone(),
        })
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

/// Timesteps and sigmas. Karras sigmas run between the first and last sigma of the grid, not of the training table.
fn levels(
    config: &SchedulerConfig,
    options: &SamplingOptions,
    training: &Training,
    grid: Vec<f64>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let steps = grid.len();
    // diffusers rounds a fractional grid to f32 before it looks sigmas up.
    let mut timesteps = to_f32(grid);
    let closing = final_sigma(config, training)?;
    let log_linear = config.one_of(
        "interpolation_type",
        &[("linear", false), ("log_linear", true)],
        false,
    )?;
    let mut sigmas: Vec<f64> = if log_linear {
        let last = training.steps() - 1;
        let log = |timestep| f64::from(training.sigma(timestep)).ln();
        linspace_f32(log(last), log(0), steps + 1)
            .into_iter()
            .map(|x| f64::from(x).exp())
            .collect()
    } else {
        timesteps.iter().map(|&t| training.sigma_at(t)).collect()
    };
    if options.sigmas(config)? == SigmaCurve::Karras {
        let (highest, lowest) = ends(config, &sigmas)?;
        sigmas = karras(highest, lowest, steps);
        timesteps = sigmas
            .iter()
            .map(|&sigma| training.timestep_of(sigma))
            .collect();
    }
    // A log-linear curve brings its own last sigma.
    if sigmas.len() == steps {
        sigmas.push(closing);
    }
    Ok((timesteps, sigmas))
}

/// The range of a Karras curve: `sigma_max` and `sigma_min`, else the ends of the grid.
fn ends(config: &SchedulerConfig, sigmas: &[f64]) -> Result<(f64, f64)> {
    let highest = config.number("sigma_max")?.unwrap_or(sigmas[0]);
    let lowest = config
        .number("sigma_min")?
        .unwrap_or(sigmas[sigmas.len() - 1]);
    if lowest > 0.0 && highest >= lowest {
        return Ok((highest, lowest));
    }
    Err(unusable(
        "sigma_min",
        &Value::Number(lowest),
        &format!("above 0, at most sigma_max ({highest})"),
    ))
}

impl Scheduler for Euler {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        // x + (σ' − σ)·(x − x0)/σ with x0 = a·x + b·output, gathered into one coefficient each; exactly x0 at σ' = 0.
        let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
        let toward_x0 = 1.0 - next / sigma;
        let (keep, add) = (1.0 - toward_x0 * (1.0 - a), toward_x0 * b);
        x.zip_mut_with(&output, |x, &m| {
            *x = (keep * f64::from(*x) + add * f64::from(m)) as f32;
        });
        Ok(x)
    }
}
