//! Euler's method without churn.
//!
//! Python twin: diffusers `EulerDiscreteScheduler`.

use super::exploding::{self, Family};
use super::{About, Denoise, Rule, Scheduler, Step, predict};
use crate::error::Result;
use crate::schedule::{
    Knob, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, TrainingDefaults,
    Value, ZeroSnr,
};
use crate::tensor::Latents;

/// x moves along `dx/dσ = (x − x0)/σ`, one straight line a step. Latents are variance-exploding.
pub(super) struct Euler;

impl Rule for Euler {
    const CLASS: &'static str = "EulerDiscreteScheduler";
    const CURVES: &'static [SigmaCurve] = SigmaCurve::ALL;
    const KNOBS: &'static [Knob] = &[
        Knob::Spacing,
        Knob::Sigmas,
        Knob::SigmaRange,
        Knob::SigmasList,
        Knob::TimestepsList,
        Knob::FinalSigma,
        Knob::ZeroSnr,
    ];
    const ABOUT: About = About {
        paper: "Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn",
        order: "1",
        calls: "n",
        noise: "none",
    };

    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        if config.prediction()? == Prediction::VPrediction {
            config.only("timestep_type", &Value::from("discrete"))?;
        }
        let family = Family {
            training: TrainingDefaults::common(ZeroSnr::Floored),
            ends: true,
            interpolates: true,
            whole_karras: false,
            curved: true,
            wide: false,
        };
        exploding::plan(config, options, family)
    }

    fn start(_: &Schedule) -> Result<Self> {
        Ok(Self)
    }
}

impl Scheduler for Euler {
    fn step(&mut self, at: Step<'_>, mut x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
        let (sigma, next) = at.schedule.levels(at.index)?;
        let output = predict(&at, &x, denoise)?;
        // x + (σ' − σ)·(x − x0)/σ with x0 = a·x + b·output, gathered into one coefficient each; exactly x0 at σ' = 0.
        let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
        let toward_x0 = 1.0 - next / sigma;
        let (keep, add) = (1.0 - toward_x0 * (1.0 - a), toward_x0 * b);
        super::blend::blend(&mut x, keep, [(add, &output)]);
        Ok(x)
    }
}
