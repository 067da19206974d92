//! PNDM: linear multistep with DDIM's way of changing levels, begun with one step of second order or three of
//! Runge–Kutta.
//!
//! Python twin: diffusers `PNDMScheduler`.

use super::blend::{blend, noise_of};
use super::discrete::{self, Ending, Family, arrival, no_sample, sigma};
use super::history::History;
use super::{About, Denoise, Rule, Scheduler, Step, predict_at};
use crate::error::Result;
use crate::schedule::{
    Knob, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults,
    ZeroSnr, alpha_s,
};
use crate::tensor::Latents;

/// ε is extrapolated from the latest predictions. Latents are variance-preserving.
pub(super) struct Pndm {
    /// Whether three Runge–Kutta steps come first; every SDXL model says no (`skip_prk_steps`).
    runge_kutta: bool,
    /// The latest three predictions of ε.
    history: History,
}

impl Pndm {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        Ok(Self {
            runge_kutta: !config.flag("skip_prk_steps", false)?,
            history: History::new(3),
        })
    }
}

impl Rule for Pndm {
    const CLASS: &'static str = "PNDMScheduler";
    const CURVES: &'static [SigmaCurve] = &[SigmaCurve::Normal];
    const KNOBS: &'static [Knob] = &[Knob::Spacing];
    const ABOUT: About = About {
        paper: "Liu et al. 2022, arXiv 2202.09778, equations 11 to 13",
        order: "2 locally, 4 in the extrapolation",
        calls: "n + 1; n + 9 with Runge-Kutta steps",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        no_sample(config.prediction()?, Self::CLASS)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Unknown),
            distilled: false,
            ending: Ending::Configured(false),
        };
        discrete::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

/// `(α, s)`.
type Level = (f64, f64);

/// One step with what its calls have in common.
struct Walk<'a, 'b, 'c> {
    at: &'a Step<'b>,
    denoise: &'a mut Denoise<'c>,
    /// Where the step begins and ends.
    from: Level,
    to: Level,
}

impl Walk<'_, '_, '_> {
    /// Whether outputs stay velocities until they are combined, as diffusers has it.
    fn raw(&self) -> bool {
        self.at.schedule.options.diffusers_quirks && self.at.prediction != Prediction::Epsilon
    }

    /// The network's answer at a level, as noise.
    fn ask(&mut self, timestep: f64, level: f64, x: &Latents) -> Result<Latents> {
        let mut output = predict_at(self.at, (level, timestep), x, self.denoise)?;
        if !self.raw() {
            let (c, d) = noise_of(alpha_s(level), self.at.prediction);
            blend(&mut output, d, [(c, x)]);
        }
        Ok(output)
    }

    /// Latents `x` of level `from`, taken to level `to` by a combination of answers.
    fn shift<const N: usize>(
        &self,
        x: &Latents,
        (from, to): (Level, Level),
        answers: [(f64, &Latents); N],
    ) -> Latents {
        let ((alpha, s), (to_alpha, to_s)) = (from, to);
        let mut keep = to_alpha / alpha;
        let mut weight = to_s - keep * s;
        if self.raw() {
            let (c, d) = noise_of(from, self.at.prediction);
            keep += weight * c;
            weight *= d;
        }
        let mut moved = x.clone();
        blend(
            &mut moved,
            keep,
            answers.map(|(share, e)| (weight * share, e)),
        );
        moved
    }

    /// The first step: once to the end with the slope here, once more with the mean of the slopes at both ends.
    fn first(&mut self, x: &Latents, e0: &Latents, next: (f64, f64)) -> Result<Latents> {
        let (timestep, level) = next;
        let end = self.shift(x, (self.from, self.to), [(1.0, e0)]);
        let e1 = self.ask(timestep, level, &end)?;
        let mut way = (self.from, alpha_s(level));
        if self.at.schedule.options.diffusers_quirks {
            let schedule = self.at.schedule;
            let stride = schedule.training.steps() / schedule.steps();
            way.0 = alpha_s(sigma(&schedule.training, timestep as usize + stride));
        }
        Ok(self.shift(x, way, [(0.5, e0), (0.5, &e1)]))
    }

    /// A step of Runge and Kutta's classical method to the next level.
    fn runge_kutta(&mut self, x: &Latents, e0: &Latents, next: (f64, f64)) -> Result<Latents> {
        let schedule = self.at.schedule;
        let (timestep, level) = next;
        let here = schedule.timesteps[self.at.index];
        let quirks = schedule.options.diffusers_quirks;
        let stride = schedule.training.steps() / schedule.steps();
        let half = if quirks {
            stride / 2
        } else {
            (here - timestep) as usize / 2
        };
        let halfway = timestep as usize + half;
        let level_of = |t: usize| alpha_s(sigma(&schedule.training, t));
        let middle = sigma(&schedule.training, halfway);
        let (from, to) = (self.from, alpha_s(level));
        // diffusers counts half a stride down for the first way and up for the others, which differ for odd strides.
        let first = if quirks {
            here as usize - half
        } else {
            halfway
        };
        let x1 = self.shift(x, (from, level_of(first)), [(1.0, e0)]);
        let e1 = self.ask(halfway as f64, middle, &x1)?;
        let x2 = self.shift(x, (from, level_of(halfway)), [(1.0, &e1)]);
        let e2 = self.ask(halfway as f64, middle, &x2)?;
        let third = if quirks {
            halfway - half
        } else {
            timestep as usize
        };
        let x3 = self.shift(x, (from, level_of(third)), [(1.0, &e2)]);
        let e3 = self.ask(timestep, level, &x3)?;
        let (outer, inner) = (1.0 / 6.0, 1.0 / 3.0);
        let answers = [(outer, e0), (inner, &e1), (inner, &e2), (outer, &e3)];
        Ok(self.shift(x, (from, to), answers))
    }
}

impl Scheduler for Pndm {
    fn step(&mut self, at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (schedule, index) = (at.schedule, at.index);
        let (level, next) = schedule.levels(index)?;
        no_sample(at.prediction, Self::CLASS)?;
        self.history.check(&at, &x)?;
        let following = schedule.timesteps.get(index + 1).map(|&t| (t, next));
        let mut walk = Walk {
            at: &at,
            denoise,
            from: alpha_s(level),
            to: arrival(schedule, index),
        };
        let e0 = walk.ask(schedule.timesteps[index], level, &x)?;
        let way = (walk.from, walk.to);
        let old = |back| self.history.back(back, &e0);
        let x = match (self.history.len(), following) {
            (0..3, Some(next)) if self.runge_kutta => walk.runge_kutta(&x, &e0, next)?,
            (0, Some(next)) => walk.first(&x, &e0, next)?,
            (0, None) => walk.shift(&x, way, [(1.0, &e0)]),
            (1, _) => walk.shift(&x, way, [(1.5, &e0), (-0.5, old(1))]),
            (2, _) => {
                let shares = [23.0, -16.0, 5.0].map(|share| share / 12.0);
                let answers = [(shares[0], &e0), (shares[1], old(1)), (shares[2], old(2))];
                walk.shift(&x, way, answers)
            }
            _ => {
                let shares = [55.0, -59.0, 37.0, -9.0].map(|share| share / 24.0);
                let answers = [
                    (shares[0], &e0),
                    (shares[1], old(1)),
                    (shares[2], old(2)),
                    (shares[3], old(3)),
                ];
                walk.shift(&x, way, answers)
            }
        };
        self.history.push(e0);
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        self.history.saved()
    }

    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        self.history.restore(history)
    }
}
