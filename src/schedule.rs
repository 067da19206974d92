//! When a run visits which noise level: timesteps and sigmas, as pure numbers.
//!
//! Python twin: `set_timesteps` of diffusers' schedulers.
//!
//! Three conventions of diffusers decide most of it. Timesteps come from one of three [`Spacing`]s over the training
//! timesteps. Sigmas are either those of the timesteps or a [`SigmaCurve`] of their own. Latents are either
//! variance-exploding (`x0 + σ·ε`) or variance-preserving (`α·x0 + s·ε` with `α = 1/√(1+σ²)`, `s = σ·α`), see
//! [`Convention`]. A run is always addressed by step index, never by searching for a timestep.

mod config;
mod curve;
mod grid;
mod options;
mod training;

pub(crate) use config::unusable;
pub use config::{SchedulerConfig, Value};
pub use curve::{SigmaCurve, SigmaRange};
pub(crate) use curve::{karras, range};
pub(crate) use grid::{Grid, some_steps};
pub use options::{FinalSigma, Knob, SamplingOptions};
pub use training::Training;
pub(crate) use training::{BetaCurve, TrainingDefaults, ZeroSnr, linspace_f32};

use crate::error::{Error, Result};
use crate::tensor::Latents;

/// Defines an enum of named choices: one spelling for the command line, JSON and error messages.
macro_rules! named {
    ($(#[$meta:meta])* $type:ident ($field:literal) { $($(#[$doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $type {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)+
        }

        impl $type {
            /// Every choice.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the command line and in JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::error::Error;

            fn from_str(text: &str) -> $crate::error::Result<Self> {
                Self::ALL.iter().copied().find(|choice| choice.name() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|choice| choice.name()).collect();
                    $crate::error::Error::request($field, format!("`{text}` is not known; choose {}", known.join(", ")))
                })
            }
        }
    };
}
pub(crate) use named;

named! {
    /// How timesteps are spread over the training timesteps (Lin et al. 2023, table 2).
    Spacing ("spacing") {
        /// Whole multiples from the low end, shifted by `steps_offset`; the highest noise level is not visited.
        Leading = "leading",
        /// Evenly from the high end; what few-step models were distilled on.
        Trailing = "trailing",
        /// Evenly with both ends.
        Linspace = "linspace",
    }
}

named! {
    /// What the network predicts.
    Prediction ("prediction") {
        /// The noise.
        Epsilon = "epsilon",
        /// The velocity `α·ε − s·x0` (Salimans & Ho 2022).
        VPrediction = "v-prediction",
        /// The clean latents.
        Sample = "sample",
    }
}

impl Prediction {
    /// The value of `prediction_type` in a scheduler's configuration.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::VPrediction => "v_prediction",
            Self::Sample => "sample",
        }
    }
}

/// How latents carry their noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Convention {
    /// `x0 + σ·ε`; the network is fed `x/√(σ²+1)`.
    Exploding,
    /// `α·x0 + s·ε`; the network is fed `x`.
    Preserving,
    /// `x0 + σ·ε`; the network is fed `x/√(σ²+d²)` and its output is a correction of x0 (Karras et al. 2022, table 1).
    Preconditioned {
        /// d, the standard deviation of the training data (`sigma_data`).
        data: f64,
    },
}

/// A planned run: one entry per step, and what the update rules look up.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// What the network is told at each step, falling; whole numbers unless the scheduler interpolates.
    pub timesteps: Vec<f64>,
    /// `σ = s/α` before each step, falling, and after the last: one more entry than `timesteps`.
    pub sigmas: Vec<f64>,
    /// Standard deviation of the initial noise.
    pub init_noise_sigma: f64,
    /// What the network that this configuration belongs to predicts.
    pub prediction: Prediction,
    /// How the latents of this run carry their noise.
    pub convention: Convention,
    /// The noise levels that the network was trained on.
    pub training: Training,
    /// The configuration, the request's wishes included, in which the update rule finds its own options.
    pub config: SchedulerConfig,
    /// What the request says beside the configuration.
    pub options: SamplingOptions,
}

impl Schedule {
    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The number of steps the base model takes when the refiner takes over at `refine_at` (0 to 1, share of the
    /// training timesteps already travelled): those with a timestep of at least `round(T − refine_at·T)`.
    ///
    /// Both halves run the same schedule; the refiner starts at the returned index. Source: `denoising_end` and
    /// `denoising_start` of diffusers' SDXL pipelines.
    pub fn handoff(&self, refine_at: f64) -> usize {
        let train_steps = self.training.steps() as f64;
        let cut = (train_steps - refine_at * train_steps).round_ties_even();
        self.timesteps.iter().filter(|&&t| t >= cut).count()
    }

    /// Latents at the noise level that step `index` starts from, made of clean latents and unit noise (`add_noise`).
    ///
    /// # Errors
    /// [`Error::Request`] when there is no such step, or the noise has another shape.
    pub fn add_noise(&self, index: usize, mut clean: Latents, noise: &Latents) -> Result<Latents> {
        let (sigma, _) = self.levels(index)?;
        if clean.shape() != noise.shape() {
            let reason = format!(
                "latents are {:?} but their noise is {:?}",
                clean.shape(),
                noise.shape()
            );
            return Err(Error::request("init", reason));
        }
        let (a, s) = self.mixture(sigma);
        clean.zip_mut_with(noise, |x, &n| {
            *x = (a * f64::from(*x) + s * f64::from(n)) as f32;
        });
        Ok(clean)
    }

    /// The shares of clean latents and unit noise in latents at σ.
    pub(crate) fn mixture(&self, sigma: f64) -> (f64, f64) {
        match self.convention {
            Convention::Preserving => alpha_s(sigma),
            Convention::Exploding | Convention::Preconditioned { .. } => (1.0, sigma),
        }
    }

    /// What latents at σ are multiplied with before the network sees them.
    pub(crate) fn input_scale(&self, sigma: f64) -> f64 {
        let data = match self.convention {
            Convention::Preserving => return 1.0,
            Convention::Exploding => 1.0,
            Convention::Preconditioned { data } => data,
        };
        1.0 / (sigma * sigma + data * data).sqrt()
    }

    /// Checks that a network which predicts this can be sampled at every level of the schedule.
    ///
    /// # Errors
    /// [`Error::Request`] for noise prediction at a level without any signal (zero terminal SNR): x0 would be 0/0.
    pub fn accepts(&self, prediction: Prediction) -> Result<()> {
        self.sigmas
            .iter()
            .try_for_each(|&sigma| self.denoised(sigma, prediction).map(drop))
    }

    /// σ before and after step `index`.
    pub(crate) fn levels(&self, index: usize) -> Result<(f64, f64)> {
        match self.sigmas.get(index..index + 2) {
            Some(&[now, next]) if index < self.steps() => Ok((now, next)),
            _ => Err(Error::request(
                "steps",
                format!(
                    "there is no step {index}; the schedule has {}",
                    self.steps()
                ),
            )),
        }
    }

    /// `(a, b)` such that the denoised latents are `a·x + b·output`, with x in this schedule's convention.
    pub(crate) fn denoised(&self, sigma: f64, prediction: Prediction) -> Result<(f64, f64)> {
        let (alpha, s) = alpha_s(sigma);
        match (prediction, self.convention) {
            (prediction, Convention::Preconditioned { data }) => {
                preconditioned(sigma, data, prediction)
            }
            (Prediction::Sample, _) => Ok((0.0, 1.0)),
            (Prediction::VPrediction, Convention::Preserving) => Ok((alpha, -s)),
            (Prediction::VPrediction, Convention::Exploding) => Ok((alpha * alpha, -s)),
            (Prediction::Epsilon, Convention::Exploding) => Ok((1.0, -sigma)),
            (Prediction::Epsilon, Convention::Preserving) if alpha > 0.0 => {
                Ok((1.0 / alpha, -s / alpha))
            }
            (Prediction::Epsilon, Convention::Preserving) => Err(Error::request(
                "scheduler",
                "`rescale_betas_zero_snr` leaves no signal at the first timestep, where a network with prediction_type \
                 \"epsilon\" cannot be sampled; use spacing leading, scheduler euler or dpmpp-2m, or a network with \
                 prediction_type \"v_prediction\"",
            )),
        }
    }
}

/// `(c_skip, c_out)` of an EDM network. Source: `precondition_outputs` of diffusers' EDM schedulers.
fn preconditioned(sigma: f64, data: f64, prediction: Prediction) -> Result<(f64, f64)> {
    let norm = sigma * sigma + data * data;
    let out = sigma * data / norm.sqrt();
    let out = match prediction {
        Prediction::Epsilon => out,
        Prediction::VPrediction => -out,
        Prediction::Sample => {
            let reason = "prediction_type \"sample\" has no meaning for an EDM network; supported: \"epsilon\", \"v_prediction\"";
            return Err(Error::request("scheduler", reason));
        }
    };
    Ok((data * data / norm, out))
}

/// `(α, s)` of a variance-preserving latent at σ, also at an infinite one.
pub(crate) fn alpha_s(sigma: f64) -> (f64, f64) {
    if sigma.is_infinite() {
        return (0.0, 1.0);
    }
    let alpha = 1.0 / (1.0 + sigma * sigma).sqrt();
    (alpha, sigma * alpha)
}

/// σ after the last step: none, or that of the first training timestep (`final_sigmas_type`).
pub(crate) fn final_sigma(config: &SchedulerConfig, training: &Training) -> Result<f64> {
    let names = [("zero", 0.0), ("sigma_min", f64::from(training.sigma(0)))];
    config.one_of("final_sigmas_type", &names, 0.0)
}

/// Rounds to f32, the type in which diffusers keeps sigmas and fractional timesteps.
pub(crate) fn to_f32(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    values
        .into_iter()
        .map(|value| f64::from(value as f32))
        .collect()
}
