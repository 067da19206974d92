//! SA-Solver: stochastic Adams, predictor and corrector.
//!
//! Python twin: diffusers `SASolverScheduler` with `algorithm_type="data_prediction"` and its own τ.

use super::blend::{blend, denoised};
use super::history::{History, foreign, restorable};
use super::preserving::{self, Ending, Family};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, predict, same_shape};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, Value, ZeroSnr,
    alpha_s,
};
use crate::tensor::Latents;

/// Most predictions that an update combines.
const MAX_ORDER: usize = 4;

/// Integrates x0 as a polynomial in λ along an SDE that adds noise in the middle of the run. Latents are
/// variance-preserving.
pub(super) struct SaSolver {
    predictor: usize,
    corrector: usize,
    lower_order_final: bool,
    /// The latest predictions of x0, as many as either update combines with the one to come.
    history: History,
    /// The latents that the latest step started from, corrected, and the noise that it added.
    last: Option<(Latents, Latents)>,
}

impl SaSolver {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        config.only("algorithm_type", &Value::from("data_prediction"))?;
        config.only("tau_func", &Value::Null)?;
        let predictor = config.count("predictor_order", 2, 1..=MAX_ORDER)?;
        let corrector = config.count("corrector_order", 2, 1..=MAX_ORDER)?;
        Ok(Self {
            predictor,
            corrector,
            lower_order_final: config.flag("lower_order_final", true)?,
            history: History::new(predictor.max(corrector).max(2) - 1),
            last: None,
        })
    }

    /// The orders of predictor and corrector over step `index`, given how many predictions there are before it.
    fn orders(&self, schedule: &Schedule, index: usize, before: usize) -> (usize, usize) {
        let left = if self.lower_order_final {
            schedule.steps() - index
        } else {
            MAX_ORDER
        };
        (
            self.predictor.min(left).min(before + 1),
            self.corrector.min(left + 1).min(before + 2),
        )
    }
}

impl Rule for SaSolver {
    const CLASS: &'static str = "SASolverScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &preserving::KNOBS;
    const ABOUT: About = About {
        paper: "Xue et al. 2023, arXiv 2309.05019, algorithm 1",
        order: "2; 1, 3 or 4 with solver-order",
        calls: "n",
        noise: "every step; it has an effect between timesteps 200 and 800",
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

/// How strong the noise is at a timestep.
fn tau(timestep: f64) -> f64 {
    if (200.0..=800.0).contains(&timestep) {
        1.0
    } else {
        0.0
    }
}

/// The coefficients of one update.
struct Weights {
    keep: f64,
    predictions: [f64; MAX_ORDER],
    noise: f64,
}

impl Weights {
    /// Over step `index`, through `order` predictions of which the newest is at level `newest` of the schedule: the
    /// step's own for the predictor, the next for the corrector.
    fn new(schedule: &Schedule, index: usize, newest: usize, order: usize) -> Self {
        let (from, to) = (schedule.sigmas[index], schedule.sigmas[index + 1]);
        let mut weights = Self {
            keep: 1.0,
            predictions: [0.0; MAX_ORDER],
            noise: 0.0,
        };
        if to == 0.0 {
            (weights.keep, weights.predictions[0]) = (0.0, 1.0);
            return weights;
        }
        let tau = tau(schedule.timesteps[index]);
        let rate = 1.0 + tau * tau;
        let lambda = |level: usize| -schedule.sigmas[level].ln();
        let (start, end) = (-from.ln(), -to.ln());
        let (h, (_, s)) = (end - start, alpha_s(to));
        if h == 0.0 {
            return weights;
        }
        let nodes: [f64; MAX_ORDER] =
            std::array::from_fn(|back| lambda(newest.saturating_sub(back)) - end);
        // λ is counted from the end of the step, where the exponential is 1.
        let moments = moments(rate, h);
        let mut shares = lagrange(&nodes[..order], &moments);
        if order == 2 {
            // The paper's second order replaces the integral of the slope by one that is exact for a constant slope.
            let rest = (h * rate - 1.0 + (-rate * h).exp()) / (rate * rate);
            let correction = if newest == index {
                (h * h / 2.0 - rest) / (lambda(index) - lambda(index - 1))
            } else {
                h / 2.0 - rest / h
            };
            shares[0] += correction;
            shares[1] -= correction;
        }
        let (_, s_from) = alpha_s(from);
        // e^{λ} of the end, times s, is α.
        let (alpha, _) = alpha_s(to);
        weights.keep = (-tau * tau * h).exp() * s / s_from;
        weights.predictions = shares.map(|share| rate * alpha * share);
        weights.noise = s * (1.0 - (-2.0 * tau * tau * h).exp()).max(0.0).sqrt();
        weights
    }
}

/// ∫ zᵏ e^{rate·z} dz over z from −h to 0, k from 0.
fn moments(rate: f64, h: f64) -> [f64; MAX_ORDER] {
    let left = (-rate * h).exp();
    let mut moments = [(1.0 - left) / rate; MAX_ORDER];
    for k in 1..MAX_ORDER {
        // By parts.
        let edge = -(-h).powi(k as i32) * left;
        moments[k] = (edge - k as f64 * moments[k - 1]) / rate;
    }
    moments
}

/// Integrals of Lagrange's polynomials through `nodes`, given those of the powers.
fn lagrange(nodes: &[f64], moments: &[f64; MAX_ORDER]) -> [f64; MAX_ORDER] {
    std::array::from_fn(|i| {
        let Some(&own) = nodes.get(i) else {
            return 0.0;
        };
        // Coefficients of Π (z − node)/(own − node), lowest power first.
        let mut polynomial = [0.0; MAX_ORDER];
        polynomial[0] = 1.0;
        for (_, &node) in nodes.iter().enumerate().filter(|(j, _)| *j != i) {
            let scale = 1.0 / (own - node);
            for power in (0..MAX_ORDER).rev() {
                let below = if power > 0 {
                    polynomial[power - 1]
                } else {
                    0.0
                };
                polynomial[power] = (below - node * polynomial[power]) * scale;
            }
        }
        polynomial.iter().zip(moments).map(|(c, m)| c * m).sum()
    })
}

impl Scheduler for SaSolver {
    fn step(
        &mut self,
        mut at: Step<'_>,
        mut x: Latents,
        denoise: &mut Denoise<'_>,
    ) -> Result<Latents> {
        let (schedule, index) = (at.schedule, at.index);
        let (sigma, _) = schedule.levels(index)?;
        self.history.check(&at, &x)?;
        let output = predict(&at, &x, denoise)?;
        let new = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        let before = self.history.len();
        if let Some((last, noise)) = self.last.take()
            && before > 0
        {
            same_shape(&last, &new)?;
            same_shape(&noise, &new)?;
            let (_, order) = self.orders(schedule, index - 1, before - 1);
            let weights = Weights::new(schedule, index - 1, index, order);
            let [w0, w1, w2, w3] = weights.predictions;
            let old = |back| self.history.back(back, &new);
            x = last;
            let terms = [
                (w0, &new),
                (w1, old(1)),
                (w2, old(2)),
                (w3, old(3)),
                (weights.noise, &noise),
            ];
            blend(&mut x, weights.keep, terms);
        }
        let noise = fresh(&mut at, &x);
        let (order, _) = self.orders(schedule, index, before);
        let weights = Weights::new(schedule, index, index, order);
        let [w0, w1, w2, w3] = weights.predictions;
        let start = x.clone();
        let old = |back| self.history.back(back, &new);
        let terms = [
            (w0, &new),
            (w1, old(1)),
            (w2, old(2)),
            (w3, old(3)),
            (weights.noise, &noise),
        ];
        blend(&mut x, weights.keep, terms);
        self.history.push(new);
        self.last = Some((start, noise));
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        let mut saved = self.history.saved();
        if let Some((start, noise)) = &self.last {
            saved.extend([start.clone(), noise.clone()]);
        }
        saved
    }

    fn restore(&mut self, mut history: Vec<Latents>) -> Result<()> {
        restorable(&history, self.predictor.max(self.corrector).max(2) + 1)?;
        let (noise, start) = (history.pop(), history.pop());
        self.last = start.zip(noise);
        if (1..3).contains(&history.len()) && self.last.is_none() {
            return Err(foreign("an incomplete history was saved"));
        }
        self.history.restore(history)
    }
}
