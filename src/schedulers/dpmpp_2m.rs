//! DPM-Solver++ multistep: the deterministic data-prediction solver of order 1 to 3.
//!
//! Python twin: diffusers `DPMSolverMultistepScheduler` with `algorithm_type="dpmsolver++"`.

use super::exponential::Path;
use super::multistep::Multistep;
use super::preserving::{self, Ending, Family};
use super::{About, Denoise, Rule, Scheduler, Step};
use crate::error::Result;
use crate::schedule::{
    Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults, ZeroSnr,
};
use crate::tensor::Latents;

/// Latents are variance-preserving.
pub(super) struct Dpmpp2m(Multistep);

/// What both algorithms of the class have.
pub(super) const FAMILY: Family = Family {
    training: TrainingDefaults::common(ZeroSnr::Floored),
    spaced: true,
    cuts_cosine: true,
    ending: Ending::Configured,
};

/// What both algorithms of the class let a request choose.
pub(super) const KNOBS: &[Knob] = &[
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

/// diffusers' class of both.
pub(super) const CLASS: &str = "DPMSolverMultistepScheduler";

impl Rule for Dpmpp2m {
    const CLASS: &'static str = CLASS;
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = KNOBS;
    const ABOUT: About = About {
        paper: "Lu et al. 2022, arXiv 2211.01095, algorithm 2",
        order: "2; 1 or 3 with solver-order",
        calls: "n",
        noise: "none",
    };

    fn serves(config: &SchedulerConfig) -> bool {
        config.class_name() == Some(CLASS) && !config.says("algorithm_type", "sde-dpmsolver++")
    }

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        config.one_of("algorithm_type", &[("dpmsolver++", ()), ("deis", ())], ())?;
        Multistep::new(config, Path::Flow)?;
        preserving::plan(config, options, FAMILY)
    }

    fn start(schedule: &Schedule) -> Result<Self> {
        Multistep::new(&schedule.config, Path::Flow).map(Self)
    }
}

impl Scheduler for Dpmpp2m {
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
