//! DPM-Solver++ singlestep: blocks of two or three steps, each of which starts from the block's beginning.
//!
//! Python twin: diffusers `DPMSolverSinglestepScheduler`. (Not k-diffusion's "DPM++ 2S a", which calls the network twice
//! a step and adds noise.)

use super::blend::{blend, denoised};
use super::exponential::{Interval, Path};
use super::history::{History, foreign, restorable};
use super::multistep::SOLVERS;
use super::preserving::{self, Ending, Family};
use super::{About, Denoise, Rule, Scheduler, Step, fresh, predict, same_shape};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
};
use crate::tensor::Latents;

/// Integrates x0 as a polynomial in λ from the block's beginning. Latents are variance-preserving.
pub(super) struct DpmppSinglestep {
    order: usize,
    heun: bool,
    path: Path,
    lower_order_final: bool,
    /// The block's predictions of x0 so far, all but the newest to come.
    history: History,
    /// The latents at the block's beginning.
    base: Option<Latents>,
}

impl DpmppSinglestep {
    fn options(config: &SchedulerConfig) -> Result<Self> {
        let algorithms = [
            ("dpmsolver++", Path::Flow),
            ("deis", Path::Flow),
            ("sde-dpmsolver++", Path::Sde),
        ];
        let order = config.count("solver_order", 2, 1..=3)?;
        Ok(Self {
            order,
            heun: config.one_of("solver_type", &SOLVERS, false)?,
            path: config.one_of("algorithm_type", &algorithms, Path::Flow)?,
            lower_order_final: config.flag("lower_order_final", false)?,
            history: History::new(order - 1),
            base: None,
        })
    }

    /// The order that step `index` has where its whole block ran: 1 begins a block.
    fn place(&self, schedule: &Schedule, index: usize) -> usize {
        let (steps, order) = (schedule.steps(), self.order);
        let to_clean = schedule.sigmas[steps] == 0.0;
        let lowers = self.lower_order_final || !steps.is_multiple_of(order) || to_clean;
        // A last whole block is split, so that the run ends with first order.
        let split = lowers && steps.is_multiple_of(order) && index + 1 == steps;
        if split || (to_clean && index + 1 == steps) {
            return 1;
        }
        index % order + 1
    }
}

impl Rule for DpmppSinglestep {
    const CLASS: &'static str = "DPMSolverSinglestepScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &[
        Knob::Sigmas,
        Knob::SigmaRange,
        Knob::SigmasList,
        Knob::TimestepsList,
        Knob::FinalSigma,
        Knob::LowerOrderFinal,
        Knob::Order,
    ];
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2211.01095, algorithm 1; arXiv 2206.00927, algorithm 2",
        order: "2; 1 or 3 with solver-order",
        calls: "n",
        noise: "where the model's configuration asks for the SDE",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Unknown),
            spaced: false,
            cuts_cosine: false,
            ending: Ending::Configured,
        };
        preserving::plan(config, options, family)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config)
    }
}

/// Weights of the newest prediction of x0, the one before, and the one before that.
fn weights(
    way: &Interval,
    schedule: &Schedule,
    index: usize,
    order: usize,
    heun: bool,
) -> [f64; 3] {
    if way.rise == 0.0 || order == 1 {
        return [way.data, 0.0, 0.0];
    }
    let sigma = |back: usize| schedule.sigmas[index - back];
    let base = sigma(order - 1);
    let r0 = way.share(base, sigma(0));
    match (order, heun) {
        (2, _) => {
            let slope = if heun { way.slope } else { way.data / 2.0 };
            [slope / r0, way.data - slope / r0, 0.0]
        }
        (_, false) => [way.slope / r0, 0.0, way.data - way.slope / r0],
        (_, true) => {
            let r1 = way.share(base, sigma(1));
            // D1 = (r0·A − r1·B)/(r0−r1), D2 = 2(B − A)/(r0−r1) with A = (m1−m2)/r1, B = (m0−m2)/r0.
            let a = (way.slope * r0 + 2.0 * way.bend) / (r0 - r1) / r1;
            let b = -(way.slope * r1 + 2.0 * way.bend) / (r0 - r1) / r0;
            [b, a, way.data - a - b]
        }
    }
}

impl Scheduler for DpmppSinglestep {
    fn step(&mut self, mut at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        self.history.check(&at, &x)?;
        let output = predict(&at, &x, denoise)?;
        let m0 = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        // Where a run begins inside a block, its first step begins one.
        let order = self
            .place(at.schedule, at.index)
            .min(self.history.len() + 1);
        let noise = (self.path == Path::Sde).then(|| fresh(&mut at, &x));
        let base = match self.base.take() {
            Some(base) if order > 1 => base,
            _ => x,
        };
        same_shape(&base, &m0)?;
        let begin = at.schedule.sigmas[at.index + 1 - order];
        let way = Interval::new(at.schedule, begin, next, self.path);
        let [w0, w1, w2] = weights(&way, at.schedule, at.index, order, self.heun);
        let mut x = base.clone();
        let (m1, m2) = (self.history.back(1, &m0), self.history.back(2, &m0));
        let terms = [(w0, &m0), (w1, m1), (w2, m2)];
        match &noise {
            Some(noise) => {
                let [a, b, c] = terms;
                blend(&mut x, way.keep, [a, b, c, (way.noise, noise)]);
            }
            None => blend(&mut x, way.keep, terms),
        }
        if order == 1 {
            self.history.clear();
        }
        self.history.push(m0);
        self.base = Some(base);
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        let mut saved = self.history.saved();
        saved.extend(self.base.clone());
        saved
    }

    fn restore(&mut self, mut history: Vec<Latents>) -> Result<()> {
        restorable(&history, self.order)?;
        self.base = history.pop();
        if self.base.is_some() && history.is_empty() && self.order > 1 {
            return Err(foreign("a history of one latent was saved"));
        }
        self.history.restore(history)
    }
}
