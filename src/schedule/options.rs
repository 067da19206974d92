//! What a request says about its schedule, over what the checkpoint's configuration says.

use serde::{Deserialize, Serialize};

use super::config::{SchedulerConfig, Value};
use super::{SigmaCurve, SigmaRange, Spacing, named};
use crate::error::{Error, Result};

named! {
    /// The noise level that a run ends at.
    FinalSigma ("final-sigma") {
        /// None: the latents end clean.
        Zero = "zero",
        /// That of the first training timestep, or the end of the curve where the scheduler says so.
        SigmaMin = "sigma-min",
    }
}

named! {
    /// A choice that some schedulers offer, under the name of its request field.
    Knob ("option") {
        /// [`SamplingOptions::spacing`].
        Spacing = "spacing",
        /// [`SamplingOptions::sigmas`].
        Sigmas = "sigmas",
        /// [`SamplingOptions::sigma_range`].
        SigmaRange = "sigma-range",
        /// [`SamplingOptions::sigmas_list`].
        SigmasList = "sigmas-list",
        /// [`SamplingOptions::timesteps_list`].
        TimestepsList = "timesteps-list",
        /// [`SamplingOptions::final_sigma`].
        FinalSigma = "final-sigma",
        /// [`SamplingOptions::lower_order_final`].
        LowerOrderFinal = "lower-order-final",
        /// [`SamplingOptions::solver_order`].
        Order = "solver-order",
        /// [`SamplingOptions::eta`].
        Eta = "eta",
        /// [`SamplingOptions::zero_snr`].
        ZeroSnr = "zero-snr",
    }
}

/// What a request says about its schedule. An option left out is the configuration's, else the scheduler's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingOptions {
    /// Number of steps.
    pub steps: usize,
    /// Overrides the configuration's `timestep_spacing`.
    pub spacing: Option<Spacing>,
    /// Overrides the configuration's `use_karras_sigmas` and its siblings.
    pub sigmas: Option<SigmaCurve>,
    /// Which levels a curve joins, where not the scheduler's own choice.
    pub sigma_range: Option<SigmaRange>,
    /// The levels themselves, falling: before each step and after the last, so one more than `steps`.
    pub sigmas_list: Option<Vec<f64>>,
    /// The timesteps themselves, falling, as many as `steps`.
    pub timesteps_list: Option<Vec<f64>>,
    /// Overrides the configuration's `final_sigmas_type`.
    pub final_sigma: Option<FinalSigma>,
    /// Overrides the configuration's `lower_order_final`.
    pub lower_order_final: Option<bool>,
    /// Overrides the configuration's `solver_order`.
    pub solver_order: Option<usize>,
    /// Share of fresh noise, `0.0..=1.0`, where a scheduler can do with less than all or with some.
    pub eta: Option<f64>,
    /// Overrides the configuration's `rescale_betas_zero_snr`.
    pub zero_snr: Option<bool>,
    /// Repeats those mistakes of diffusers that are put right by default (the table in ARCHITECTURE.md).
    pub diffusers_quirks: bool,
}

impl SamplingOptions {
    /// A number of steps and nothing else.
    pub fn steps(steps: usize) -> Self {
        Self {
            steps,
            ..Self::default()
        }
    }

    /// The choices that were made.
    pub(crate) fn asked(&self) -> impl Iterator<Item = Knob> {
        let made = [
            (self.spacing.is_some(), Knob::Spacing),
            (self.sigmas.is_some(), Knob::Sigmas),
            (self.sigma_range.is_some(), Knob::SigmaRange),
            (self.sigmas_list.is_some(), Knob::SigmasList),
            (self.timesteps_list.is_some(), Knob::TimestepsList),
            (self.final_sigma.is_some(), Knob::FinalSigma),
            (self.lower_order_final.is_some(), Knob::LowerOrderFinal),
            (self.solver_order.is_some(), Knob::Order),
            (self.eta.is_some(), Knob::Eta),
            (self.zero_snr.is_some(), Knob::ZeroSnr),
        ];
        made.into_iter().filter_map(|(is, knob)| is.then_some(knob))
    }

    /// Refuses choices that contradict each other, whatever the scheduler, and lists that do not fall.
    pub(crate) fn check(&self) -> Result<()> {
        let lists = [
            (
                Knob::SigmasList,
                self.sigmas_list.as_deref(),
                self.steps + 1,
                "one more than steps",
            ),
            (
                Knob::TimestepsList,
                self.timesteps_list.as_deref(),
                self.steps,
                "as many as steps",
            ),
        ];
        for (knob, list, length, rule) in lists {
            let Some(list) = list else { continue };
            let clash = self.asked().find(|&other| clashes(knob, other));
            if let Some(other) = clash {
                let reason = format!("leaves nothing for {other} to decide; give one of the two");
                return Err(Error::request(knob.name(), reason));
            }
            if list.len() != length {
                let reason = format!(
                    "has {} values for {} steps; it takes {rule}",
                    list.len(),
                    self.steps
                );
                return Err(Error::request(knob.name(), reason));
            }
            falling(knob, list)?;
        }
        if self.eta.is_some_and(|eta| !(0.0..=1.0).contains(&eta)) {
            let reason = format!("{} is outside 0.0 to 1.0", self.eta.unwrap_or_default());
            return Err(Error::request("eta", reason));
        }
        Ok(())
    }

    /// The configuration with what the request overrides, under diffusers' names.
    pub(crate) fn over(&self, config: &SchedulerConfig) -> SchedulerConfig {
        let mut config = config.clone();
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                config = std::mem::take(&mut config).with(key, value);
            }
        };
        set(
            "timestep_spacing",
            self.spacing.map(|spacing| spacing.name().into()),
        );
        let last = |end| match end {
            FinalSigma::Zero => "zero",
            FinalSigma::SigmaMin => "sigma_min",
        };
        set(
            "final_sigmas_type",
            self.final_sigma.map(|end| last(end).into()),
        );
        set("lower_order_final", self.lower_order_final.map(Value::Flag));
        let order = self.solver_order.map(|order| Value::Number(order as f64));
        for key in ["solver_order", "predictor_order", "corrector_order"] {
            set(key, order.clone());
        }
        set("rescale_betas_zero_snr", self.zero_snr.map(Value::Flag));
        config
    }

    /// The request's curve, else the configuration's.
    pub(crate) fn curve(&self, config: &SchedulerConfig) -> Result<SigmaCurve> {
        if let Some(curve) = self.sigmas {
            return Ok(curve);
        }
        let keys = [
            ("use_karras_sigmas", SigmaCurve::Karras),
            ("use_exponential_sigmas", SigmaCurve::Exponential),
            ("use_beta_sigmas", SigmaCurve::Beta),
        ];
        let mut chosen = None;
        for (key, curve) in keys {
            if config.flag(key, false)?
                && let Some((earlier, _)) = chosen.replace((key, curve))
            {
                let reason =
                    format!("the scheduler's configuration has both `{earlier}` and `{key}`");
                return Err(Error::request(
                    "sigmas",
                    format!("{reason}; choose one with sigmas"),
                ));
            }
        }
        Ok(chosen.map_or(SigmaCurve::Normal, |(_, curve)| curve))
    }
}

/// Whether a list of `knob` makes a choice of `other` meaningless.
fn clashes(knob: Knob, other: Knob) -> bool {
    let both = [
        Knob::Spacing,
        Knob::Sigmas,
        Knob::SigmaRange,
        Knob::TimestepsList,
    ];
    let ends_itself = knob == Knob::SigmasList && other == Knob::FinalSigma;
    other != knob && (both.contains(&other) || ends_itself)
}

/// Refuses a list that is not made of finite numbers from 0 up, each below the one before it.
fn falling(knob: Knob, list: &[f64]) -> Result<()> {
    let bad = list
        .iter()
        .find(|value| !(value.is_finite() && **value >= 0.0));
    if let Some(value) = bad {
        let reason = format!("{value} is not a number from 0 up");
        return Err(Error::request(knob.name(), reason));
    }
    let rises = |&(before, after): &(&f64, &f64)| before <= after;
    if let Some((before, after)) = list.iter().zip(list.iter().skip(1)).find(rises) {
        let reason = format!("{after} follows {before}, but a list must fall");
        return Err(Error::request(knob.name(), reason));
    }
    Ok(())
}
