//! Linear multistep: Adams–Bashforth in σ, of order 4 once three steps are done.
//!
//! Python twin: diffusers `LMSDiscreteScheduler`, which integrates numerically what is integrated exactly here.

use super::blend::{blend, denoised};
use super::exploding::{self, Family};
use super::history::History;
use super::{About, Denoise, Rule, Scheduler, Step, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
};
use crate::tensor::Latents;

/// Order of the method.
const ORDER: usize = 4;

/// Integrates `dx/dσ = (x − x0)/σ` as a polynomial through the latest slopes. Latents are variance-exploding.
pub(super) struct Lms {
    /// The latest three slopes.
    history: History,
}

impl Rule for Lms {
    const CLASS: &'static str = "LMSDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = exploding::KNOBS;
    const ABOUT: About = About {
        paper: "Adams and Bashforth 1883; for diffusion: Crowson 2022, k-diffusion",
        order: "4",
        calls: "n",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Unknown),
            ends: false,
            interpolates: false,
            whole_karras: false,
            curved: true,
            wide: false,
        };
        exploding::plan(config, options, family)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self {
            history: History::new(ORDER - 1),
        })
    }
}

/// The weights of the newest `order` slopes, newest first: integrals of Lagrange's polynomials over the step.
///
/// The order is that of the slopes that there are. (diffusers takes it from the step's index, so that a run which
/// begins in the middle has weights for slopes that it lacks.)
fn weights(schedule: &Schedule, index: usize, order: usize) -> [f64; ORDER] {
    let (sigma, next) = (schedule.sigmas[index], schedule.sigmas[index + 1]);
    let node = |back: usize| schedule.sigmas[index - back];
    let basis = |j: usize, at: f64| -> f64 {
        let others = (0..order).filter(|&k| k != j);
        others
            .map(|k| (at - node(k)) / (node(j) - node(k)))
            .product()
    };
    // Gauss's two points integrate polynomials of degree 3 exactly.
    let (centre, reach) = (f64::midpoint(sigma, next), (next - sigma) / 2.0);
    let off = reach / 3.0_f64.sqrt();
    std::array::from_fn(|j| {
        if j < order {
            reach * (basis(j, centre - off) + basis(j, centre + off))
        } else {
            0.0
        }
    })
}

impl Scheduler for Lms {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, _) = at.schedule.levels(at.index)?;
        self.history.check(&at, &x)?;
        let output = predict(&at, &x, denoise)?;
        let mut slope = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        blend(&mut slope, -1.0 / sigma, [(1.0 / sigma, &x)]);
        let order = self.history.len() + 1;
        let [w0, w1, w2, w3] = weights(at.schedule, at.index, order);
        let older = |back| self.history.back(back, &slope);
        let terms = [(w0, &slope), (w1, older(1)), (w2, older(2)), (w3, older(3))];
        blend(&mut x, 1.0, terms);
        self.history.push(slope);
        Ok(x)
    }

    fn history(&self) -> Vec<Latents> {
        self.history.saved()
    }

    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        self.history.restore(history)
    }
}
