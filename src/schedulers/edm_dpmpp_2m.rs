//! DPM-Solver++ multistep for networks with EDM preconditioning, such as Playground v2.5.
//!
//! Python twin: diffusers `EDMDPMSolverMultistepScheduler`. Its third order on the SDE fails there for want of noise.

use super::exponential::Path;
use super::multistep::Multistep;
use super::{About, Denoise, Rule, Scheduler, Step, edm_euler};
use crate::error::Result;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::tensor::Latents;

/// Latents are variance-exploding, networks preconditioned.
pub(super) struct EdmDpmpp2m(Multistep);

impl EdmDpmpp2m {
    fn options(config: &SchedulerConfig) -> Result<Multistep> {
        let algorithms = [
            ("dpmsolver++", Path::Flow),
            ("deis", Path::Flow),
            ("sde-dpmsolver++", Path::Sde),
        ];
        let path = config.one_of("algorithm_type", &algorithms, Path::Flow)?;
        config.refuse(
            "thresholding",
            "dynamic thresholding suits pixels, not latents",
        )?;
        Multistep::new(config, path)
    }
}

impl Rule for EdmDpmpp2m {
    const CLASS: &'static str = "EDMDPMSolverMultistepScheduler";
    const CURVES: &'static [SigmaCurve] = edm_euler::CURVES;
    const KNOBS: &'static [Knob] = &[
        Knob::Sigmas,
        Knob::SigmasList,
        Knob::FinalSigma,
        Knob::LowerOrderFinal,
        Knob::Order,
    ];
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2211.01095; Karras et al. 2022, arXiv 2206.00364",
        order: "2; 1 or 3 with solver-order",
        calls: "n",
        noise: "where the model's configuration asks for the SDE",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        Self::options(config)?;
        edm_euler::plan(config, options)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Self::options(&schedule.config).map(Self)
    }
}

impl Scheduler for EdmDpmpp2m {
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
