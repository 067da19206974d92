//! DPM-Solver++ on the reverse SDE, two calls a step, with noise from a Brownian tree.
//!
//! Python twin: diffusers `DPMSolverSDEScheduler`, k-diffusion's `sample_dpmpp_sde` at η = 1 and r = ½.

use super::blend::{blend, denoised};
use super::brownian::BrownianTree;
use super::exploding::{self, Family, ancestral, between, middle};
use super::{About, Denoise, Rule, Scheduler, Step, heun, predict, predict_at};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::tensor::Latents;

/// A step takes the slope in its middle, and noise that belongs to its place on the path, not to its number: runs of
/// different steps and one seed follow the same path. Latents are variance-exploding.
#[derive(Default)]
pub(super) struct DpmppSde {
    tree: Option<BrownianTree>,
}

impl Rule for DpmppSde {
    const CLASS: &'static str = "DPMSolverSDEScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = exploding::KNOBS;
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2211.01095; the tree: Li et al. 2020, arXiv 2001.01328",
        order: "2",
        calls: "2n - 1",
        noise: "both calls of every step but the last, from a tree of the seed",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        config.number("noise_sampler_seed")?;
        let family = Family {
            wide: true,
            ..heun::FAMILY
        };
        exploding::plan(config, options, family)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self::default())
    }
}

/// The path's tree: from the seed of the request, or of the configuration where it names one.
///
/// (diffusers draws a seed from torch's global generator, so that runs with one generator differ.)
fn tree(at: &Step<'_>, x: &Latents) -> Result<BrownianTree> {
    let configured = at.schedule.config.number("noise_sampler_seed")?;
    let seed = configured.map_or_else(|| at.noise.position().seed, |seed| seed as u64);
    let lowest = at.schedule.sigmas.iter().rev().find(|sigma| **sigma > 0.0);
    let ends = (lowest.copied().unwrap_or_default(), at.schedule.sigmas[0]);
    Ok(BrownianTree::new(seed, ends, x.len()))
}

impl Scheduler for DpmppSde {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        let x0 = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        if next == 0.0 {
            return Ok(x0);
        }
        let mut tree = match self.tree.take() {
            Some(tree) if tree.len() == x.len() => tree,
            _ => tree(&at, &x)?,
        };
        let middle = middle(sigma, next);
        let mut halfway = x.clone();
        go(&mut halfway, &x0, (sigma, middle), &mut tree);
        let output = predict_at(&at, between(&at, middle), &halfway, denoise)?;
        let halfway0 = denoised(&at, middle, &halfway, output, f64::INFINITY)?;
        go(&mut x, &halfway0, (sigma, next), &mut tree);
        self.tree = Some(tree);
        Ok(x)
    }
}

/// Takes latents from a level to another along clean latents, with the path's noise on the way.
///
/// The path tells levels apart in their sixth decimal. diffusers asks it at the exponential of the logarithm of a level, in
/// f32, which now and then is the neighbouring place: a difference of about a thousandth in the noise.
fn go(x: &mut Latents, x0: &Latents, (from, to): (f64, f64), tree: &mut BrownianTree) {
    let (down, up) = ancestral(from, to);
    let keep = down / from;
    blend(x, keep, [(1.0 - keep, x0)]);
    // Time runs down, so the increment has the other sign.
    tree.add_increment(x, (to, from), -up);
}
