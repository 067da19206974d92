//! DEIS: exponential integrator with the noise as a polynomial in ln σ.
//!
//! Python twin: diffusers `DEISMultistepScheduler`.

use super::blend::{blend, noise_of};
use super::history::History;
use super::multistep::FEW_STEPS;
use super::preserving::{self, Ending, Family};
use super::{About, Denoise, Rule, Scheduler, Step, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
    alpha_s,
};
use crate::tensor::Latents;

/// Integrates ε over σ through the latest predictions. Latents are variance-preserving.
pub(super) struct Deis {
    order: usize,
    lower_order_final: bool,
    /// The latest `order − 1` predictions of ε.
    history: History,
}

impl Deis {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        // As in diffusers, the names of its relatives mean DEIS here.
        let algorithms = ["deis", "dpmsolver", "dpmsolver++"];
        config.one_of("algorithm_type", &algorithms.map(|name| (name, ())), ())?;
        let solvers = ["logrho", "midpoint", "heun", "bh1", "bh2"];
        config.one_of("solver_type", &solvers.map(|name| (name, ())), ())?;
        let order = config.count("solver_order", 2, 1..=3)?;
        Ok(Self {
            order,
            lower_order_final: config.flag("lower_order_final", true)?,
            history: History::new(order - 1),
        })
    }

    /// The order of step `index`, given how many older predictions there are.
    fn order_at(&self, schedule: &Schedule, index: usize) -> usize {
        let left = schedule.steps() - index;
        let stabilise = self.lower_order_final && schedule.steps() < FEW_STEPS;
        // ln σ has no value at the end of a list that ends at zero.
        let to_clean = schedule.sigmas[index + 1] == 0.0;
        let limit = match left {
            1 if stabilise || to_clean => 1,
            2 if stabilise => 2,
            _ => self.order,
        };
        limit.min(self.history.len() + 1)
    }
}

impl Rule for Deis {
    const CLASS: &'static str = "DEISMultistepScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &preserving::KNOBS;
    const ABOUT: About = About {
        paper: "Zhang and Chen 2023, arXiv 2204.13902, log-rho AB-DEIS",
        order: "2; 1 or 3 with solver-order",
        calls: "n",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Unknown),
            spaced: true,
            cuts_cosine: false,
            ending: Ending::Lowest,
        };
        preserving::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

/// The weights of the newest `order` predictions, newest first: integrals over σ of Lagrange's polynomials in ln σ.
fn weights(schedule: &Schedule, index: usize, order: usize) -> [f64; 3] {
    let (from, to) = (schedule.sigmas[index], schedule.sigmas[index + 1]);
    let node = |back: usize| schedule.sigmas[index - back].ln();
    // ∫ (ln σ)ᵏ dσ from 0, k = 0, 1, 2.
    let moments = |sigma: f64| {
        let log = if sigma > 0.0 { sigma.ln() } else { 0.0 };
        let first = sigma * (log - 1.0);
        [sigma, first, sigma * log * log - 2.0 * first]
    };
    let (upper, lower) = (moments(to), moments(from));
    let moment = |k: usize| upper[k] - lower[k];
    std::array::from_fn(|j| match order {
        _ if j >= order => 0.0,
        1 => moment(0),
        2 => {
            let c = node(1 - j);
            (moment(1) - c * moment(0)) / (node(j) - c)
        }
        _ => {
            let (c, d) = (node((j + 1) % 3), node((j + 2) % 3));
            let over = (node(j) - c) * (node(j) - d);
            (moment(2) - (c + d) * moment(1) + c * d * moment(0)) / over
        }
    })
}

impl Scheduler for Deis {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        self.history.check(&at, &x)?;
        let mut noise = predict(&at, &x, denoise)?;
        let ((alpha, s), (to_alpha, _)) = (alpha_s(sigma), alpha_s(next));
        let (c, d) = noise_of((alpha, s), at.prediction);
        blend(&mut noise, d, [(c, &x)]);
        // At an infinite σ this rule has no first step; its classes do not know zero terminal SNR.
        let order = self.order_at(at.schedule, at.index);
        let weights = weights(at.schedule, at.index, order).map(|w| to_alpha * w);
        let (e1, e2) = (self.history.back(1, &noise), self.history.back(2, &noise));
        let terms = [(weights[0], &noise), (weights[1], e1), (weights[2], e2)];
        blend(&mut x, to_alpha / alpha, terms);
        self.history.push(noise);
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        self.history.saved()
    }

    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        self.history.restore(history)
    }
}
