//! How one step changes the latents: the trait, the catalogue of update rules, and the one match over it.
//!
//! Python twin: `step` of diffusers' schedulers.
//!
//! A new scheduler is a file here that implements [`Scheduler`] and `Rule`, its `mod` line, and its line in the
//! catalogue below. Nothing else in the crate knows schedulers by name. What several of them share has one home:
//! `exploding`, `preserving` and `discrete` plan schedules, `exponential` holds the integrals of the solvers in
//! λ = −ln σ, `multistep` the DPM-Solver++ family, `blend` the arithmetic on latents, `history` what is remembered.
//!
//! A step is whole: a rule of second order calls the network twice inside it, so that a run may stop, resume or change
//! its network between any two steps. (In diffusers, which counts model calls, the refiner may take over in the middle
//! of a Heun step.)

mod blend;
mod brownian;
mod cost;
mod discrete;
mod exploding;
mod exponential;
mod history;
mod multistep;
mod preserving;

mod ddim;
mod ddpm;
mod deis;
mod dpm2;
mod dpm2_ancestral;
mod dpmpp_2m;
mod dpmpp_2m_sde;
mod dpmpp_sde;
mod dpmpp_singlestep;
mod edm_dpmpp_2m;
mod edm_euler;
mod euler;
mod euler_ancestral;
mod heun;
mod lcm;
mod lms;
mod pndm;
mod sa_solver;
mod tcd;
mod unipc;

use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::schedule::{
    Convention, Knob, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, named,
};
use crate::tensor::Latents;

catalogue! {
    /// Euler's method on the probability-flow ODE.
    Euler = "euler" => euler::Euler,
    /// Euler's method to below the next level, and fresh noise up to it.
    EulerAncestral = "euler-ancestral" => euler_ancestral::EulerAncestral,
    /// Heun's method: Euler's, corrected by the slope at its end.
    Heun = "heun" => heun::Heun,
    /// DDIM, deterministic unless `eta` asks for noise.
    Ddim = "ddim" => ddim::Ddim,
    /// Ancestral sampling of the trained Markov chain.
    Ddpm = "ddpm" => ddpm::Ddpm,
    /// DPM-Solver++ multistep.
    Dpmpp2m = "dpmpp-2m" => dpmpp_2m::Dpmpp2m,
    /// DPM-Solver++ multistep on the reverse SDE.
    Dpmpp2mSde = "dpmpp-2m-sde" => dpmpp_2m_sde::Dpmpp2mSde,
    /// DPM-Solver++ on the reverse SDE, two calls a step, along a Brownian tree.
    DpmppSde = "dpmpp-sde" => dpmpp_sde::DpmppSde,
    /// DPM-Solver++ in blocks of two or three steps.
    DpmppSinglestep = "dpmpp-singlestep" => dpmpp_singlestep::DpmppSinglestep,
    /// DPM-Solver-2: the midpoint method in ln σ.
    Dpm2 = "dpm2" => dpm2::Dpm2,
    /// DPM-Solver-2 to below the next level, and fresh noise up to it.
    Dpm2Ancestral = "dpm2-ancestral" => dpm2_ancestral::Dpm2Ancestral,
    /// Linear multistep (Adams–Bashforth in σ).
    Lms = "lms" => lms::Lms,
    /// Pseudo numerical methods: linear multistep on the manifold of noise levels.
    Pndm = "pndm" => pndm::Pndm,
    /// UniPC: a multistep predictor, corrected by the next call.
    Unipc = "unipc" => unipc::UniPc,
    /// DEIS: exponential integrator with noise as a polynomial in ln σ.
    Deis = "deis" => deis::Deis,
    /// Sampling of latent consistency models.
    Lcm = "lcm" => lcm::Lcm,
    /// Sampling of trajectory consistency models.
    Tcd = "tcd" => tcd::Tcd,
    /// SA-Solver: stochastic Adams, predictor and corrector.
    SaSolver = "sa-solver" => sa_solver::SaSolver,
    /// Euler's method for networks with EDM preconditioning.
    EdmEuler = "edm-euler" => edm_euler::EdmEuler,
    /// DPM-Solver++ multistep for networks with EDM preconditioning.
    EdmDpmpp2m = "edm-dpmpp-2m" => edm_dpmpp_2m::EdmDpmpp2m,
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
        history::restorable(&history, 0)
    }
}

/// What a scheduler is, for lists and manuals.
#[derive(Debug, Clone, Copy)]
pub struct About {
    /// Where it was published.
    pub paper: &'static str,
    /// Order of accuracy.
    pub order: &'static str,
    /// Model calls of n steps.
    pub calls: &'static str,
    /// Whether it draws noise.
    pub noise: &'static str,
}

/// What the catalogue asks of an update rule besides stepping.
trait Rule: Scheduler + Sized + 'static {
    /// The diffusers class with the same semantics.
    const CLASS: &'static str;
    /// The sigma curves that it has.
    const CURVES: &'static [SigmaCurve];
    /// What a request may choose.
    const KNOBS: &'static [Knob];
    /// What it is.
    const ABOUT: About;

    /// Whether this is the rule of a checkpoint's configuration.
    fn serves(config: &SchedulerConfig) -> bool {
        config.class_name() == Some(Self::CLASS)
    }

    /// The schedule that diffusers' class plans for this configuration, in which the request's wishes already are;
    /// checks every option that `start` reads.
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
                        knobs: <$rule as Rule>::KNOBS,
                        about: <$rule as Rule>::ABOUT,
                        serves: <$rule as Rule>::serves,
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
    knobs: &'static [Knob],
    about: About,
    serves: fn(&SchedulerConfig) -> bool,
    plan: fn(&SchedulerConfig, &SamplingOptions) -> Result<Schedule>,
    start: fn(&Schedule) -> Result<Box<dyn Scheduler>>,
}

impl SchedulerKind {
    /// The scheduler that a checkpoint's configuration names in `_class_name`.
    ///
    /// # Errors
    /// [`Error::Request`] when it names none, or one that this engine does not have.
    pub fn of(config: &SchedulerConfig) -> Result<Self> {
        let found = Self::ALL.iter().find(|kind| (kind.facts().serves)(config));
        found.copied().ok_or_else(|| {
            let class = config.class_name().unwrap_or_default();
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

    /// The diffusers class with the same semantics.
    pub const fn class(self) -> &'static str {
        self.facts().class
    }

    /// Paper, order and cost.
    pub const fn about(self) -> About {
        self.facts().about
    }

    /// The sigma curves that this scheduler has.
    pub const fn curves(self) -> &'static [SigmaCurve] {
        self.facts().curves
    }

    /// What a request may choose with this scheduler.
    pub const fn knobs(self) -> &'static [Knob] {
        self.facts().knobs
    }

    /// Plans a run: diffusers' `from_config` followed by `set_timesteps`.
    ///
    /// # Errors
    /// [`Error::Request`] for an option or a sigma curve that this scheduler lacks, a number of steps that leaves the
    /// training timesteps, or a configuration that asks for something this engine does not do.
    pub fn plan(self, config: &SchedulerConfig, options: &SamplingOptions) -> Result<Schedule> {
        options.check()?;
        // A curve is refused by its own name below, and the one that follows the timesteps is no choice.
        for knob in options.asked().filter(|knob| *knob != Knob::Sigmas) {
            if !self.knobs().contains(&knob) {
                let reason = format!(
                    "has no effect with {self}; it goes with {}",
                    names(|k| k.knobs().contains(&knob))
                );
                return Err(Error::request(knob.name(), reason));
            }
        }
        self.check_curve(config, options)?;
        let schedule = (self.facts().plan)(&options.over(config), options)?;
        schedule.accepts(schedule.prediction)?;
        Ok(schedule)
    }

    /// Refuses a curve that this scheduler lacks, and a range for one that has none.
    fn check_curve(self, config: &SchedulerConfig, options: &SamplingOptions) -> Result<()> {
        if let Some(curve) = options.sigmas
            && !self.curves().contains(&curve)
        {
            let reason = format!(
                "{self} has no {curve} sigmas; they go with {}",
                names(|k| k.curves().contains(&curve))
            );
            return Err(Error::request("sigmas", reason));
        }
        if options.sigma_range.is_some() {
            let curve = options.curve(config)?;
            if !curve.has_range() {
                let reason = format!(
                    "has no effect with {curve} sigmas; it goes with karras, exponential, beta"
                );
                return Err(Error::request("sigma-range", reason));
            }
        }
        Ok(())
    }

    /// What is likely to go wrong with a schedule that can be run all the same.
    pub fn advice(self, config: &SchedulerConfig, schedule: &Schedule) -> Option<String> {
        if let Convention::Preconditioned { .. } = schedule.convention {
            // Such networks say so; others make noise of such schedules.
            let own = config.class_name().unwrap_or_default();
            let fits =
                config.number("sigma_data").ok().flatten().is_some() || own.starts_with("EDM");
            return (!fits).then(|| {
                format!("{self} is for networks with EDM preconditioning, and this model is configured for `{own}`")
            });
        }
        let last = (schedule.training.steps() - 1) as f64;
        let first = schedule.timesteps.first().copied().unwrap_or(last);
        (first < 0.7 * last).then(|| {
            format!(
                "the first of {} steps is at timestep {first} of {last}, where the network expects half a picture; use \
                 more steps, or spacing trailing",
                schedule.steps()
            )
        })
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

/// Runs the network on the latents that step `at` starts from, scaled as its convention demands.
fn predict(at: &Step<'_>, x: &Latents, denoise: &mut Denoise<'_>) -> Result<Latents> {
    let (sigma, _) = at.schedule.levels(at.index)?;
    predict_at(at, (sigma, at.schedule.timesteps[at.index]), x, denoise)
}

/// Runs the network on latents of any level, given as σ and timestep.
fn predict_at(
    at: &Step<'_>,
    (sigma, timestep): (f64, f64),
    x: &Latents,
    denoise: &mut Denoise<'_>,
) -> Result<Latents> {
    let output = if at.schedule.convention == Convention::Preserving {
        denoise(x, timestep)?
    } else {
        let scale = at.schedule.input_scale(sigma);
        denoise(&x.mapv(|v| (f64::from(v) * scale) as f32), timestep)?
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

/// Fresh noise of the shape of `x`.
fn fresh(at: &mut Step<'_>, x: &Latents) -> Latents {
    let (batch, channels, height, width) = x.dim();
    at.noise.normal([batch, channels, height, width])
}
