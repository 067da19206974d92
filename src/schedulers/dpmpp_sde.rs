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
    /// One for all pictures, or one for each.
    trees: Vec<BrownianTree>,
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

/// The paths' trees: from the seeds of the request, or the one of the configuration where it names one.
///
/// (diffusers draws a seed from torch's global generator, so that runs with one generator differ.)
fn trees(at: &Step<'_>, x: &Latents) -> Result<Vec<BrownianTree>> {
    let configured = at.schedule.config.number("noise_sampler_seed")?;
    let mut positions = at.noise.positions();
    if let (Some(seed), Some(first)) = (configured, positions.first_mut()) {
        first.seed = seed as u64;
        positions.truncate(1);
    }
    let lowest = at.schedule.sigmas.iter().rev().find(|sigma| **sigma > 0.0);
    let ends = (lowest.copied().unwrap_or_default(), at.schedule.sigmas[0]);
    let values = x.len() / positions.len().max(1);
    let seeds = positions.iter().map(|p| (p.kind, p.seed));
    Ok(seeds
        .map(|seed| BrownianTree::new(seed, ends, values))
        .collect())
}

impl Scheduler for DpmppSde {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        if next == 0.0 {
            let output = predict(&at, &x, denoise)?;
            return denoised(&at, sigma, &x, output, f64::INFINITY);
        }
        if self.trees.iter().map(BrownianTree::len).sum::<usize>() != x.len() {
            self.trees = trees(&at, &x)?;
        }
        let middle = middle(sigma, next);
        // The path is followed while the network runs, which takes longer.
        let output = std::thread::scope(|scope| {
            let trees = &mut self.trees;
            scope.spawn(|| {
                let each = trees.iter_mut();
                each.for_each(|tree| tree.follow(&[sigma, middle, next]));
            });
            predict(&at, &x, denoise)
        })?;
        let x0 = denoised(&at, sigma, &x, output, f64::INFINITY)?;
        let mut halfway = x.clone();
        go(&mut halfway, &x0, (sigma, middle), &mut self.trees);
        let output = predict_at(&at, between(&at, middle), &halfway, denoise)?;
        let halfway0 = denoised(&at, middle, &halfway, output, f64::INFINITY)?;
        go(&mut x, &halfway0, (sigma, next), &mut self.trees);
        Ok(x)
    }
}

/// Takes latents from a level to another along clean latents, with the path's noise on the way.
///
/// The path tells levels apart in their sixth decimal. diffusers asks it at the exponential of the logarithm of a level, in
/// f32, which now and then is the neighbouring place: a difference of about a thousandth in the noise.
fn go(x: &mut Latents, x0: &Latents, (from, to): (f64, f64), trees: &mut [BrownianTree]) {
    let (down, up) = ancestral(from, to);
    let keep = down / from;
    blend(x, keep, [(1.0 - keep, x0)]);
    // Time runs down, so the increment has the other sign.
    let each = (x.len() / trees.len().max(1)).max(1);
    if let Some(x) = x.as_slice_memory_order_mut() {
        for (x, tree) in x.chunks_exact_mut(each).zip(trees) {
            tree.add_increment(x, (to, from), -up);
        }
    }
}
