//! UniPC: a multistep predictor whose every step is corrected by the network's next answer.
//!
//! Python twin: diffusers `UniPCMultistepScheduler` with `predict_x0=True`.

use super::blend::{blend, denoised};
use super::exponential::{Interval, Path};
use super::history::{History, foreign, restorable};
use super::preserving::{self, Ending, Family};
use super::{About, Denoise, Rule, Scheduler, Step, predict, same_shape};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, Value, ZeroSnr,
};
use crate::tensor::Latents;

/// Most predictions that an update combines.
const MAX_ORDER: usize = 3;

/// Integrates x0 as a polynomial in λ, twice: before and after the network has seen the result. Latents are
/// variance-preserving.
pub(super) struct UniPc {
    order: usize,
    /// B(h) = h instead of e^h − 1.
    bh1: bool,
    lower_order_final: bool,
    /// Steps whose result is not corrected.
    uncorrected: Vec<usize>,
    /// The latest `order` predictions of x0.
    history: History,
    /// The latents that the latest step started from, corrected.
    last: Option<Latents>,
}

impl UniPc {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        // As in diffusers, the solver types of its relatives mean bh2 here.
        let solvers = [
            ("bh2", false),
            ("bh1", true),
            ("midpoint", false),
            ("heun", false),
            ("logrho", false),
        ];
        config.only("predict_x0", &Value::Flag(true))?;
        config.only("solver_p", &Value::Null)?;
        let order = config.count("solver_order", 2, 1..=MAX_ORDER)?;
        let uncorrected = config.numbers("disable_corrector")?.unwrap_or_default();
        Ok(Self {
            order,
            bh1: config.one_of("solver_type", &solvers, false)?,
            lower_order_final: config.flag("lower_order_final", true)?,
            uncorrected: uncorrected.iter().map(|step| *step as usize).collect(),
            history: History::new(order),
            last: None,
        })
    }

    /// The order of the predictor at step `index`, given how many predictions there are.
    fn order_at(&self, schedule: &Schedule, index: usize, predictions: usize) -> usize {
        let to_clean = schedule.sigmas[index + 1] == 0.0;
        let limit = if self.lower_order_final {
            schedule.steps() - index
        } else if to_clean {
            // B(h) is infinite here.
            1
        } else {
            self.order
        };
        limit.min(self.order).min(predictions)
    }

    /// The weights of the update over step `index` of an order: latents, predictions of the history from the newest,
    /// and the network's answer to the result where there is one.
    fn weights(&self, schedule: &Schedule, index: usize, order: usize, answered: bool) -> Weights {
        let way = Way::new(schedule, index, self.bh1);
        let older = order - 1;
        // The older predictions' places, then the answer's, which is one step ahead.
        let mut points = [1.0; MAX_ORDER];
        for (back, point) in (1..).zip(&mut points[..older]) {
            *point = way.place(schedule, index, back);
        }
        let shares = match (order, answered) {
            // A step that goes nowhere, from a curve's own end: differences have no weight.
            _ if way.scale == 0.0 => [0.0; MAX_ORDER],
            (1, true) | (2, false) => [0.5; MAX_ORDER],
            (_, true) => way.solve(&points[..order]),
            (_, false) => way.solve(&points[..older]),
        };
        let mut weights = Weights {
            keep: way.interval.keep,
            predictions: [way.interval.data, 0.0, 0.0],
            answer: 0.0,
        };
        for j in 0..older {
            let weight = way.scale * shares[j] / points[j];
            weights.predictions[j + 1] = weight;
            weights.predictions[0] -= weight;
        }
        if answered {
            weights.answer = way.scale * shares[older];
            weights.predictions[0] -= weights.answer;
        }
        weights
    }
}

/// The coefficients of one update.
struct Weights {
    keep: f64,
    predictions: [f64; MAX_ORDER],
    answer: f64,
}

/// One step's interval, as UniPC needs it.
struct Way {
    interval: Interval,
    /// −α·B(h), by which differences of predictions are weighed.
    scale: f64,
    /// Right-hand sides of the order conditions.
    conditions: [f64; MAX_ORDER],
}

impl Way {
    fn new(schedule: &Schedule, index: usize, bh1: bool) -> Self {
        let (from, to) = (schedule.sigmas[index], schedule.sigmas[index + 1]);
        let interval = Interval::new(schedule, from, to, Path::Flow);
        let (alpha, _) = schedule.mixture(to);
        // e^{−h} − 1 and −h.
        let (phi, minus_h) = (to / from - 1.0, -interval.rise);
        let b = if bh1 { minus_h } else { phi };
        let mut conditions = [0.0; MAX_ORDER];
        let (mut phi_k, mut factorial) = (phi / minus_h - 1.0, 1.0);
        for (i, condition) in conditions.iter_mut().enumerate() {
            *condition = phi_k * factorial / b;
            factorial *= (i + 2) as f64;
            phi_k = phi_k / minus_h - 1.0 / factorial;
        }
        Self {
            scale: if interval.rise == 0.0 || b.is_infinite() {
                0.0
            } else {
                -alpha * b
            },
            conditions: if interval.rise == 0.0 || to == 0.0 {
                [0.0; MAX_ORDER]
            } else {
                conditions
            },
            interval,
        }
    }

    /// Where the prediction `back` steps before step `index` lies, in steps from its beginning: negative.
    fn place(&self, schedule: &Schedule, index: usize, back: usize) -> f64 {
        if self.interval.rise == 0.0 {
            return -1.0;
        }
        let share = self
            .interval
            .share(schedule.sigmas[index - back], schedule.sigmas[index]);
        -share
    }

    /// ρ with Σⱼ rⱼ^q ρⱼ = condition q, for as many q from 0 as there are points r.
    fn solve(&self, points: &[f64]) -> [f64; MAX_ORDER] {
        let mut rows = [[0.0; MAX_ORDER + 1]; MAX_ORDER];
        for (q, row) in (0..).zip(&mut rows) {
            for (cell, point) in row.iter_mut().zip(points) {
                *cell = point.powi(q);
            }
        }
        for (row, condition) in rows.iter_mut().zip(self.conditions) {
            row[MAX_ORDER] = condition;
        }
        eliminate(rows, points.len())
    }
}

/// Gauss's elimination of the first `count` rows and columns; the right-hand sides are in the last column.
fn eliminate(mut rows: [[f64; MAX_ORDER + 1]; MAX_ORDER], count: usize) -> [f64; MAX_ORDER] {
    for pivot in 0..count {
        let size = |row: usize| rows[row][pivot].abs();
        let best = (pivot..count).max_by(|&a, &b| size(a).total_cmp(&size(b)));
        rows.swap(pivot, best.unwrap_or(pivot));
        for row in 0..count {
            if row != pivot {
                let factor = rows[row][pivot] / rows[pivot][pivot];
                let above = rows[pivot];
                for (cell, above) in rows[row].iter_mut().zip(above) {
                    *cell -= factor * above;
                }
            }
        }
    }
    std::array::from_fn(|i| {
        if i < count {
            rows[i][MAX_ORDER] / rows[i][i]
        } else {
            0.0
        }
    })
}

impl Rule for UniPc {
    const CLASS: &'static str = "UniPCMultistepScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &[
        Knob::Spacing,
        Knob::Sigmas,
        Knob::SigmaRange,
        Knob::SigmasList,
        Knob::TimestepsList,
        Knob::FinalSigma,
        Knob::LowerOrderFinal,
        Knob::Order,
        Knob::ZeroSnr,
    ];
    const ABOUT: About = About {
        paper: "Zhao et al. 2023, arXiv 2302.04867, algorithms 5 and 6",
        order: "3; 2 or 4 with solver-order (one more than the predictor's)",
        calls: "n",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Floored),
            spaced: true,
            cuts_cosine: false,
            ending: Ending::ConfiguredOfCurve,
        };
        preserving::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

impl Scheduler for UniPc {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (schedule, index) = (at.schedule, at.index);
        let (sigma, _) = schedule.levels(index)?;
        self.history.check(&at, &x)?;
        let output = predict(&at, &x, denoise)?;
        let new = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        let corrected = index > 0 && !self.uncorrected.contains(&(index - 1));
        if let Some(last) = self.last.take() {
            same_shape(&last, &new)?;
            if corrected && let Some(m0) = self.history.newest() {
                let order = self.order_at(schedule, index - 1, self.history.len());
                let weights = self.weights(schedule, index - 1, order, true);
                let [w0, w1, w2] = weights.predictions;
                let (m1, m2) = (self.history.back(2, m0), self.history.back(3, m0));
                x = last;
                let terms = [(w0, m0), (w1, m1), (w2, m2), (weights.answer, &new)];
                blend(&mut x, weights.keep, terms);
            }
        }
        self.history.push(new);
        self.last = Some(x.clone());
        let order = self.order_at(schedule, index, self.history.len());
        let weights = self.weights(schedule, index, order, false);
        if let Some(m0) = self.history.newest() {
            let [w0, w1, w2] = weights.predictions;
            let (m1, m2) = (self.history.back(2, m0), self.history.back(3, m0));
            blend(&mut x, weights.keep, [(w0, m0), (w1, m1), (w2, m2)]);
        }
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        let mut saved = self.history.saved();
        saved.extend(self.last.clone());
        saved
    }

    fn restore(&mut self, mut history: Vec<Latents>) -> Result<()> {
        restorable(&history, self.order + 1)?;
        self.last = history.pop();
        if self.last.is_some() && history.is_empty() {
            return Err(foreign("a history of one latent was saved"));
        }
        self.history.restore(history)
    }
}
