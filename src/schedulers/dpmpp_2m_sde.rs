//! DPM-Solver++ multistep on the reverse SDE: every step removes more noise than it must and adds fresh.
//!
//! Python twin: diffusers `DPMSolverMultistepScheduler` with `algorithm_type="sde-dpmsolver++"`.

use super::exponential::Path;
use super::multistep::Multistep;
use super::{About, Denoise, Rule, Scheduler, Step, dpmpp_2m, preserving};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::tensor::Latents;

/// Latents are variance-preserving.
pub(super) struct Dpmpp2mSde(Multistep);

impl Rule for Dpmpp2mSde {
    const CLASS: &'static str = dpmpp_2m::CLASS;
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = dpmpp_2m::KNOBS;
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2211.01095, section 4.3 and appendix B",
        order: "2; 1 or 3 with solver-order",
        calls: "n",
        noise: "every step",
    };

    fn serves(config: &SchedulerConfig) -> bool {
        config.class_name() == Some(Self::CLASS) && config.says("algorithm_type", "sde-dpmsolver++")
    }

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        // The name says which algorithm, so the configuration may name the other one of the pair.
        let algorithms = ["sde-dpmsolver++", "dpmsolver++", "deis"];
        config.one_of("algorithm_type", &algorithms.map(|name| (name, ())), ())?;
        Multistep::new(config, Path::Sde)?;
        preserving::plan(config, options, dpmpp_2m::FAMILY)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Multistep::new(&schedule.config, Path::Sde).map(Self)
    }
}

impl Scheduler for Dpmpp2mSde {
    fn step(&mut self, at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        self.0.step(at, x, denoise)
    }

    fn history(&self) -> Vec<Latents> {
        self.0.history()
    }

    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        self.0.restore(history)
    }
}
