//! The DPM-Solver++ multistep update, on the probability-flow ODE or the reverse SDE, with or without EDM preconditioning.
//!
//! Python twin: `step` of diffusers' `DPMSolverMultistepScheduler` and `EDMDPMSolverMultistepScheduler`.

use super::blend::{blend, denoised};
use super::exponential::{Interval, Path};
use super::history::History;
use super::{Denoise, Step, fresh, predict};
use crate::error::Result;
use crate::schedule::{Schedule, SchedulerConfig};
use crate::tensor::Latents;

/// Fewer steps than this are stabilised by lower orders at the end.
pub(super) const FEW_STEPS: usize = 15;

/// Names of solver types; those of DEIS and UniPC mean midpoint, as in diffusers. True is Heun's.
pub(super) const SOLVERS: [(&str, bool); 5] = [
    ("midpoint", false),
    ("heun", true),
    ("logrho", false),
    ("bh1", false),
    ("bh2", false),
];

/// Integrates x0 as a polynomial in λ through the latest predictions.
pub(super) struct Multistep {
    order: usize,
    heun: bool,
    path: Path,
    lower_order_final: bool,
    euler_at_final: bool,
    /// The latest `order − 1` predictions of x0.
    history: History,
}

impl Multistep {
    /// The options of the configuration.
    pub(super) fn new(config: &SchedulerConfig, path: Path) -> Result<Self> {
        let order = config.count("solver_order", 2, 1..=3)?;
        Ok(Self {
            order,
            heun: config.one_of("solver_type", &SOLVERS, false)?,
            path,
            lower_order_final: config.flag("lower_order_final", true)?,
            euler_at_final: config.flag("euler_at_final", false)?,
            history: History::new(order - 1),
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

    /// One step.
    pub(super) fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (sigma, _) = at.schedule.levels(at.index)?;
        self.history.check(&at, &x)?;
        let output = predict(&at, &x, denoise)?;
        let m0 = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        let update = Update::new(
            at.schedule,
            at.index,
            self.order_at(at.schedule, at.index),
            (self.path, self.heun),
        );
        let (m1, m2) = (self.history.back(1, &m0), self.history.back(2, &m0));
        let [w0, w1, w2] = update.weights;
        if self.path == Path::Sde {
            let noise = fresh(&mut at, &x);
            let terms = [(w0, &m0), (w1, m1), (w2, m2), (update.noise, &noise)];
            blend(&mut x, update.keep, terms);
        } else {
            blend(&mut x, update.keep, [(w0, &m0), (w1, m1), (w2, m2)]);
        }
        self.history.push(m0);
        Ok(x)
    }

    /// The predictions that the next step needs.
    pub(super) fn history(&self) -> Vec<Latents> {
        self.history.saved()
    }

    /// Puts them back.
    pub(super) fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        self.history.restore(history)
    }
}

/// The coefficients of one update: latents, predictions of x0 from the newest, noise.
struct Update {
    keep: f64,
    weights: [f64; 3],
    noise: f64,
}

impl Update {
    fn new(schedule: &Schedule, index: usize, order: usize, (path, heun): (Path, bool)) -> Self {
        let sigma = |back: usize| schedule.sigmas[index - back];
        let way = Interval::new(schedule, sigma(0), schedule.sigmas[index + 1], path);
        let (mut first, mut second) = (0.0, 0.0);
        if way.rise > 0.0 && order == 2 {
            let slope = if heun { way.slope } else { way.data / 2.0 };
            first = slope / way.share(sigma(1), sigma(0));
        } else if way.rise > 0.0 && order == 3 {
            let r0 = way.share(sigma(1), sigma(0));
            let r1 = way.share(sigma(2), sigma(1));
            // D1 = D + r0/(r0+r1)·(D − D'), D2 = (D − D')/(r0+r1) with D = (m0−m1)/r0, D' = (m1−m2)/r1.
            let difference = (way.slope * r0 - way.bend) / (r0 + r1);
            first = (way.slope + difference) / r0;
            second = -difference / r1;
        }
        // first·(m0 − m1) + second·(m1 − m2), gathered by prediction.
        Self {
            keep: way.keep,
            weights: [way.data + first, second - first, -second],
            noise: way.noise,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{SamplingOptions, SigmaCurve};
    use crate::schedulers::SchedulerKind;

    fn update(quirks: bool, steps: usize) -> Update {
        let options = SamplingOptions {
            sigmas: Some(SigmaCurve::Exponential),
            diffusers_quirks: quirks,
            ..SamplingOptions::steps(steps)
        };
        let config = SchedulerConfig::default();
        let kind = SchedulerKind::Dpmpp2mSde;
        let schedule = kind.plan(&config, &options).unwrap();
        Update::new(&schedule, 5, 3, (Path::Sde, true))
    }

    #[test]
    fn the_third_order_of_the_sde_vanishes_with_the_step_but_not_in_diffusers() {
        // Weights of the predictions as shares of their sum: over short steps those of an Adams method, of size one; with
        // the wrong sign they grow as the step shrinks, for the half is divided by it.
        let shares = |quirks| {
            let update = update(quirks, 990);
            let whole: f64 = update.weights.iter().sum();
            update.weights.map(|w| w / whole)
        };
        let right = shares(false);
        assert!(right[0] < 2.0 && right[2].abs() < 0.5, "{right:?}");
        let wrong = shares(true);
        assert!(wrong[2].abs() > 10.0, "{wrong:?}");
    }
}
