//! How one step changes the latents: the trait, the catalogue of update rules, and the one match over it.
//!
//! Python twin: `step` of diffusers' schedulers.
//!
//! A new scheduler is a file here that implements [`Scheduler`] and `Rule`, its `mod` line, and its line in the
//! catalogue below. Nothing else in the crate knows schedulers by name.

mod ddim;
mod dpmpp_2m;
mod euler;

use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::schedule::{
    Convention, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, named,
};
use crate::tensor::Latents;

catalogue! {
    /// Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2 without churn).
    Euler = "euler" => euler::Euler,
    /// DDIM without added noise (Song et al. 2021, equation 12 at η = 0).
    Ddim = "ddim" => ddim::Ddim,
    /// DPM-Solver++ multistep, second order unless the configuration says 1 or 3 (Lu et al. 2022).
    Dpmpp2m = "dpmpp-2m" => dpmpp_2m::DpmPlusPlus,
}

/// The network as a step sees it: model input (already scaled as the network expects) and timestep in, guided output
/// out. A step may call it more than once.
pub type Denoise<'a> = dyn FnMut(&Latents, f64) -> Result<Latents> + 'a;

/// Where a run stands.
#[derive(Debug)]
pub struct Step<'a> {
    /// The whole run's schedule, whatever part of it this segment executes.
    pub schedule: &'a Schedule,
    /// Zero-based step in that schedule.
    pub index: usize,
    /// What this segment's network predicts; the schedule's own unless another network took over.
    pub prediction: Prediction,
    /// Where rules that add noise draw it.
    pub noise: &'a mut Noise,
}

/// An update rule with the state that it carries from step to step.
pub trait Scheduler: Send {
    /// Takes latents from the noise level before step `at.index` to the one after it. Shape `[batch, 4, h/8, w/8]`,
    /// in the schedule's [`Convention`].
    ///
    /// # Errors
    /// Whatever `denoise` returns; [`Error::Contract`] when its output has another shape than the latents;
    /// [`Error::Request`] when the schedule has no such step.
    fn step(&mut self, at: Step<'_>, x: Latents, denoise: &mut Denoise<'_>) -> Result<Latents>;

    /// What the next step needs from earlier ones, oldest first: saved with the latents, it makes a resumed run
    /// bitwise equal to an unbroken one.
    fn history(&self) -> Vec<Latents> {
        Vec::new()
    }

    /// Puts a saved history back.
    ///
    /// # Errors
    /// [`Error::Request`] when it is longer than this rule ever keeps.
    fn restore(&mut self, history: Vec<Latents>) -> Result<()> {
        restorable(&history, 0)
    }
}

/// What the catalogue asks of an update rule besides stepping.
trait Rule: Scheduler + Sized + 'static {
    /// The diffusers class with the same semantics.
    const CLASS: &'static str;
    /// The sigma curves that it has.
    const CURVES: &'static [SigmaCurve];

    /// The schedule that diffusers' class plans for this configuration; checks every option that `start` reads.
    fn plan(config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule>;

    /// The rule before its first step.
    fn start(schedule: &Schedule) -> Result<Self>;
}

/// Defines [`SchedulerKind`] and the only match over it.
macro_rules! catalogue {
    ($($(#[$doc:meta])* $variant:ident = $name:literal => $rule:ty,)+) => {
        named! {
            /// A scheduler, by the name that requests use.
            SchedulerKind ("scheduler") { $($(#[$doc])* $variant = $name,)+ }
        }

        impl SchedulerKind {
            /// What the catalogue knows of a rule without building it.
            const fn facts(self) -> Facts {
                match self {
                    $(Self::$variant => Facts {
                        class: <$rule as Rule>::CLASS,
                        curves: <$rule as Rule>::CURVES,
                        plan: <$rule as Rule>::plan,
                        start: |schedule| Ok(Box::new(<$rule as Rule>::start(schedule)?)),
                    },)+
                }
            }
        }
    };
}
use catalogue;

/// A [`Rule`] without its type.
struct Facts {
    class: &'static str,
    curves: &'static [SigmaCurve],
    plan: fn(&SchedulerConfig, &SamplingOptions) -> Result<Schedule>,
    start: fn(&Schedule) -> Result<Box<dyn Scheduler>>,
}

impl SchedulerKind {
    /// The scheduler that a checkpoint's configuration names in `_class_name`.
    ///
    /// # Errors
    /// [`Error::Request`] when it names none, or one that this engine does not have.
    pub fn of(config: &SchedulerConfig) -> Result<Self> {
        let class = config.class_name().unwrap_or_default();
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.facts().class == class)
            .ok_or_else(|| {
                let reason = format!(
                    "the model's own scheduler is `{class}`, which is not known; choose {}",
                    names(|_| true)
                );
                Error::request("scheduler", reason)
            })
    }

    /// Every scheduler's name, for messages.
    pub fn known() -> String {
        names(|_| true)
    }

    /// The sigma curves that this scheduler has.
    pub const fn curves(self) -> &'static [SigmaCurve] {
        self.facts().curves
    }

    /// Plans a run: diffusers' `from_config` followed by `set_timesteps`.
    ///
    /// # Errors
    /// [`Error::Request`] for a sigma curve that this scheduler lacks, a number of steps that leaves the training
    /// timesteps, or a configuration that asks for something this engine does not do.
    pub fn plan(self, config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        if let Some(curve) = options.sigmas
            && !self.curves().contains(&curve)
        {
            let reason = format!(
                "{self} has no {curve} sigmas; they go with {}",
                names(|k| k.curves().contains(&curve))
            );
            return Err(Error::request("sigmas", reason));
        }
        let schedule = (self.facts().plan)(config, options)?;
        schedule.accepts(schedule.prediction)?;
        Ok(schedule)
    }

    /// The update rule before its first step; once per segment, which may begin at any step.
    ///
    /// # Errors
    /// [`Error::Request`] when the schedule's configuration does not suit this scheduler, which one that
    /// [`SchedulerKind::plan`] of the same scheduler made always does.
    pub fn start(self, schedule: &Schedule) -> Result<Box<dyn Scheduler>> {
        (self.facts().start)(schedule)
    }
}

/// The schedulers that satisfy a condition, for error messages.
fn names(which: impl Fn(SchedulerKind) -> bool) -> String {
    let names: Vec<_> = SchedulerKind::ALL
        .iter()
        .filter(|kind| which(**kind))
        .map(|kind| kind.name())
        .collect();
    names.join(", ")
}

/// Runs the network on the latents of one level, scaled as its convention demands.
fn predict(at: &Step<'_>, x: &Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
    let (sigma, _) = at.schedule.levels(at.index)?;
    let timestep = at.schedule.timesteps[at.index];
    let output = match at.schedule.convention {
        Convention::Preserving => denoise(x, timestep)?,
        Convention::Exploding => {
            let norm = (sigma * sigma + 1.0).sqrt();
            denoise(&x.mapv(|v| (f64::from(v) / norm) as f32), timestep)?
        }
    };
    same_shape(&output, x)?;
    Ok(output)
}

/// Refuses to combine tensors of different shapes.
fn same_shape(output: &Latents, x: &Latents) -> Result<()> {
    if output.shape() == x.shape() {
        return Ok(());
    }
    Err(Error::Contract {
        graph: "unet".to_owned(),
        tensor: "latents".to_owned(),
        expected: format!("{:?}", x.shape()),
        actual: format!("{:?}", output.shape()),
    })
}

/// Refuses a history of more entries than the rule keeps.
fn restorable(history: &[Latents], most: usize) -> Result<()> {
    if history.len() <= most {
        return Ok(());
    }
    let reason = format!(
        "a history of {} steps was saved, but this scheduler keeps {most}",
        history.len()
    );
    Err(Error::request(
        "scheduler",
        format!("{reason}; resume with the scheduler that the run was started with"),
    ))
}
