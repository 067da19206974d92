//! DPM-Solver++ multistep: the deterministic data-prediction solver of order 1 to 3.
//!
//! Python twin: diffusers `DPMSolverMultistepScheduler` with `algorithm_type="dpmsolver++"`.

use std::collections::VecDeque;

use ndarray::Zip;

use super::{Denoise, Rule, Scheduler, Step, predict, restorable, same_shape};
use crate::error::{Error, Result};
use crate::schedule::{
    BetaCurve, Convention, Grid, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Spacing,
    Training, TrainingDefaults, Value, ZeroSnr, alpha_s, final_sigma, karras, to_f32,
};
use crate::tensor::Latents;

/// Fewer steps than this are stabilised by lower orders at the end.
const FEW_STEPS: usize = 15;

/// Integrates x0 as a polynomial in λ = −ln σ through the latest predictions. Latents are variance-preserving.
pub(super) struct DpmPlusPlus {
    order: usize,
    heun: bool,
    lower_order_final: bool,
    euler_at_final: bool,
    /// The latest `order − 1` predictions of x0, oldest first.
    history: VecDeque<Latents>,
}

impl DpmPlusPlus {
    /// The rule's own options.
    fn options(config: &SchedulerConfig) -> Result<Self> {
        config.one_of("algorithm_type", &[("dpmsolver++", ())], ())?;
        // As in diffusers, the solver types of DEIS and UniPC mean midpoint here.
        let solvers = [
            ("midpoint", false),
            ("heun", true),
            ("logrho", false),
            ("bh1", false),
            ("bh2", false),
        ];
        config.refuse(
            "thresholding",
            "dynamic thresholding suits pixels, not latents",
        )?;
        for key in ["use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"] {
            config.refuse(key, "this engine does not have it")?;
        }
        config.only("lambda_min_clipped", &Value::Number(f64::NEG_INFINITY))?;
        config.only("variance_type", &Value::Null)?;
        Ok(Self {
            order: config.count("solver_order", 2, 1..=3)?,
            heun: config.one_of("solver_type", &solvers, false)?,
            lower_order_final: config.flag("lower_order_final", true)?,
            euler_at_final: config.flag("euler_at_final", false)?,
            history: VecDeque::new(),
        })
    }

    /// The order of step `index`, given how many older predictions there are.
    fn order_at(&self, schedule: &Schedule, index: usize) -> usize {
        let left = schedule.steps() - index;
        let stabilise = self.lower_order_final && schedule.steps() < FEW_STEPS;
        let to_clean = schedule.sigmas[index + 1] == 0.0;
        let limit = match left {
            1 if self.euler_at_final || stabilise || to_clean => 1,
            2 if stabilise => 2,
            _ => self.order,
        };
        limit.min(self.history.len() + 1)
    }
}

impl Rule for DpmPlusPlus {
    const CLASS: &'static str = "DPMSolverMultistepScheduler";
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
        Self::options(config)?;
        let grid = Grid {
            train_steps: training.steps(),
            steps: options.steps,
            offset: config.count("steps_offset", 0, 0..=training.steps())?,
            open_end: true,
        };
        let spacing = options.spacing(config, Spacing::Linspace)?;
        let (timesteps, mut sigmas) = match options.sigmas(config)? {
            SigmaCurve::Normal => {
                let timesteps: Vec<f64> = grid
                    .timesteps(spacing)?
                    .into_iter()
                    .map(f64::round_ties_even)
                    .collect();
                let sigmas = timesteps.iter().map(|&t| training.sigma_at(t)).collect();
                (timesteps, sigmas)
            }
            SigmaCurve::Karras => karras_levels(&training, options.steps)?,
        };
        sigmas.push(final_sigma(config, &training)?);
        Ok(Schedule {
            timesteps,
            sigmas: to_f32(sigmas),
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

/// Karras sigmas over the whole training table, whatever the spacing, and their timesteps.
fn karras_levels(training: &Training, steps: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    if steps == 0 || steps > training.steps() {
        return Err(Error::request(
            "steps",
            format!("{steps} steps; choose 1 to {}", training.steps()),
        ));
    }
    let highest = f64::from(training.sigma(training.steps() - 1));
    let sigmas = karras(highest, f64::from(training.sigma(0)), steps);
    let whole = |t: f64| {
        if training.is_cosine() {
            t.trunc()
        } else {
            t.round_ties_even()
        }
    };
    let timesteps = sigmas
        .iter()
        .map(|&sigma| whole(training.timestep_of(sigma)))
        .collect();
    Ok((timesteps, sigmas))
}

/// The coefficients of one update: `keep·x + data·m0 + first·(m0 − m1) + second·(m1 − m2)`, mᵢ being predictions of x0,
/// newest first.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Update {
    keep: f64,
    data: f64,
    first: f64,
    second: f64,
}

impl Update {
    /// `sigmas` are those after the step, before it, and before each older prediction that the order uses.
    fn new(sigmas: &[f64], heun: bool) -> Self {
        let ((alpha, s), (_, s_now)) = (alpha_s(sigmas[0]), alpha_s(sigmas[1]));
        // λ differences as logarithms of ratios; e^{−h} is the ratio itself, and 0 at the end.
        let gap = |i: usize| (sigmas[i + 1] / sigmas[i]).ln();
        let ratio = sigmas[0] / sigmas[1];
        if gap(0) == 0.0 {
            // A Karras curve that ends at σ_min already: nothing is left to remove, and 1/h would not be finite.
            return Self {
                keep: 1.0,
                data: 0.0,
                first: 0.0,
                second: 0.0,
            };
        }
        let base = Self {
            keep: s / s_now,
            data: alpha * (1.0 - ratio),
            first: 0.0,
            second: 0.0,
        };
        match sigmas.len() {
            2 => base,
            3 => {
                let (h, r0) = (gap(0), gap(1) / gap(0));
                let slope = if heun {
                    alpha * ((ratio - 1.0) / h + 1.0)
                } else {
                    alpha * (1.0 - ratio) / 2.0
                };
                Self {
                    first: slope / r0,
                    ..base
                }
            }
            _ => {
                let h = gap(0);
                let (r0, r1) = (gap(1) / h, gap(2) / h);
                let slope = alpha * ((ratio - 1.0) / h + 1.0);
                let bend = alpha * ((ratio - 1.0 + h) / (h * h) - 0.5);
                // D1 = D + r0/(r0+r1)·(D − D'), D2 = (D − D')/(r0+r1) with D = (m0−m1)/r0, D' = (m1−m2)/r1.
                let difference = (slope * r0 - bend) / (r0 + r1);
                Self {
                    first: (slope + difference) / r0,
                    second: -difference / r1,
                    ..base
                }
            }
        }
    }
}

impl Scheduler for DpmPlusPlus {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, _) = at.schedule.levels(at.index)?;
        if self.history.len() > at.index {
            let reason = format!(
                "a history of {} steps cannot precede step {}",
                self.history.len(),
                at.index
            );
            return Err(Error::request("scheduler", reason));
        }
        self.history
            .iter()
            .try_for_each(|old| same_shape(old, &x))?;
        let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
        let mut m0 = predict(&at, &x, denoise)?;
        m0.zip_mut_with(&x, |m, &x| {
            *m = (a * f64::from(x) + b * f64::from(*m)) as f32;
        });

        let order = self.order_at(at.schedule, at.index);
        let sigmas: Vec<f64> = (0..=order)
            .map(|back| at.schedule.sigmas[at.index + 1 - back])
            .collect();
        let update = Update::new(&sigmas, self.heun);
        let older = |back: usize| self.history.iter().rev().nth(back - 1).unwrap_or(&m0);
        let (m1, m2) = (older(1), older(2));
        Zip::from(&mut x)
            .and(&m0)
            .and(m1)
            .and(m2)
            .for_each(|x, &m0, &m1, &m2| {
                let (m0, m1, m2) = (f64::from(m0), f64::from(m1), f64::from(m2));
                let polynomial =
                    update.data * m0 + update.first * (m0 - m1) + update.second * (m1 - m2);
                *x = (update.keep * f64::from(*x) + polynomial) as f32;
            });

        self.history.push_back(m0);
        while self.history.len() >= self.order {
            self.history.pop_front();
        }
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        self.history.iter().cloned().collect()
    }

    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        restorable(&history, self.order - 1)?;
        self.history = history.into();
        Ok(())
    }
}
