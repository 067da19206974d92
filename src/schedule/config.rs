//! The checkpoint's scheduler configuration, read key by key and never silently ignored.
//!
//! Python twin: diffusers `ConfigMixin.from_config`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::{Prediction, Spacing};
use crate::error::{Error, Result};

/// Every key that a scheduler of this engine reads.
const KEYS: &[&str] = &[
    "algorithm_type",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "final_sigmas_type",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "num_train_timesteps",
    "original_inference_steps",
    "predict_x0",
    "prediction_type",
    "predictor_order",
    "rescale_betas_zero_snr",
    "rho",
    "set_alpha_to_one",
    "sigma_data",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "tau_func",
    "thresholding",
    "timestep_scaling",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
];

/// The key under which diffusers stores which scheduler a configuration was written by.
const CLASS_KEY: &str = "_class_name";

/// The keys of a diffusers `scheduler_config.json`.
///
/// Kept as a map because every scheduler class reads its own keys: a key that is present carries over to any
/// scheduler that knows it, an absent key takes that scheduler's own default, and a key that only other schedulers know is
/// left alone. This is what `TargetScheduler.from_config(config)` does in diffusers. A key that the scheduler knows but
/// whose value it does not support is an error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct SchedulerConfig {
    keys: BTreeMap<String, Value>,
}

/// One value of a configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// Absent on purpose.
    Null,
    /// A switch.
    Flag(bool),
    /// Any number; JSON makes no difference between integers and floats.
    Number(f64),
    /// A name, or one of `Infinity`, `-Infinity`, `NaN`.
    Text(String),
    /// Betas.
    Numbers(Vec<f64>),
    /// Something that no scheduler reads.
    Other(serde::de::IgnoredAny),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Numbers(numbers) => write!(f, "a list of {} numbers", numbers.len()),
            Self::Other(_) => f.write_str("a nested value"),
        }
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl SchedulerConfig {
    /// Reads the text of a `scheduler_config.json`.
    ///
    /// Python writes `-Infinity` (the usual value of `lambda_min_clipped`), which is not JSON; it is accepted here.
    ///
    /// # Errors
    /// [`Error::Request`] when the text is not a JSON object.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(&quote_non_finite(text)).map_err(|e| {
            Error::request(
                "scheduler",
                format!("the scheduler's configuration is not a JSON object: {e}"),
            )
        })
    }

    /// The same configuration with one key set.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.keys.insert(key.to_owned(), value.into());
        self
    }

    /// The same configuration with all keys that `over` has in place of its own.
    #[must_use]
    pub fn overridden_by(&self, over: &Self) -> Self {
        let mut keys = self.keys.clone();
        keys.extend(over.keys.clone());
        Self { keys }
    }

    /// Its keys and what they say.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.keys.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A key that no scheduler of this engine reads, if there is one.
    pub(crate) fn unknown_key(&self) -> Option<&str> {
        let mut keys = self.keys.keys().map(String::as_str);
        keys.find(|key| !KEYS.contains(key))
    }

    /// The diffusers class that wrote this configuration, if it says so.
    pub fn class_name(&self) -> Option<&str> {
        match self.keys.get(CLASS_KEY) {
            Some(Value::Text(name)) => Some(name),
            _ => None,
        }
    }

    /// Whether a key has this very name as its value.
    pub(crate) fn says(&self, key: &str, name: &str) -> bool {
        matches!(self.keys.get(key), Some(Value::Text(text)) if text == name)
    }

    /// What the network predicts: `prediction_type`, epsilon when absent as in every diffusers class.
    ///
    /// # Errors
    /// [`Error::Request`] for a prediction type that is not supported.
    pub fn prediction(&self) -> Result<Prediction> {
        let all = [
            Prediction::Epsilon,
            Prediction::VPrediction,
            Prediction::Sample,
        ];
        let names = all.map(|prediction| (prediction.key(), prediction));
        self.one_of("prediction_type", &names, Prediction::Epsilon)
    }

    /// `timestep_spacing`.
    pub(crate) fn spacing(&self, default: Spacing) -> Result<Spacing> {
        let names: Vec<(&str, Spacing)> = Spacing::ALL.iter().map(|s| (s.name(), *s)).collect();
        self.one_of("timestep_spacing", &names, default)
    }

    /// A switch; null counts as off, as in Python.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.keys.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Flag(flag)) => Ok(*flag),
            Some(other) => Err(unusable(key, other, "true, false")),
        }
    }

    /// A switch that this engine has only the off position of.
    pub(crate) fn refuse(&self, key: &str, why: &str) -> Result<()> {
        if self.flag(key, false)? {
            return Err(unusable(key, &Value::Flag(true), &format!("false; {why}")));
        }
        Ok(())
    }

    /// A finite number, `None` when the key is absent or null.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) if number.is_finite() => Ok(Some(*number)),
            Some(other) => Err(unusable(key, other, "a finite number")),
        }
    }

    /// A whole number inside `range`.
    pub(crate) fn count(
        &self,
        key: &str,
        default: usize,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<usize> {
        let Some(value) = self.keys.get(key) else {
            return Ok(default);
        };
        let allowed = || format!("whole numbers from {} to {}", range.start(), range.end());
        match value {
            Value::Number(n) if n.fract() == 0.0 && *n >= 0.0 && range.contains(&(*n as usize)) => {
                Ok(*n as usize)
            }
            other => Err(unusable(key, other, &allowed())),
        }
    }

    /// One of a few names.
    pub(crate) fn one_of<T: Copy>(&self, key: &str, names: &[(&str, T)], default: T) -> Result<T> {
        let Some(value) = self.keys.get(key) else {
            return Ok(default);
        };
        if let Value::Text(text) = value
            && let Some((_, choice)) = names.iter().find(|(name, _)| name == text)
        {
            return Ok(*choice);
        }
        let allowed: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        Err(unusable(key, value, &allowed.join(", ")))
    }

    /// A list of numbers, `None` when the key is absent or null.
    pub(crate) fn numbers(&self, key: &str) -> Result<Option<&[f64]>> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Numbers(numbers)) => Ok(Some(numbers)),
            Some(other) => Err(unusable(key, other, "a list of numbers, null")),
        }
    }

    /// Requires that a key is absent, null or has this very value, which may be infinite.
    pub(crate) fn only(&self, key: &str, allowed: &Value) -> Result<()> {
        let same = |value: &Value| match (value, allowed) {
            (Value::Text(text), Value::Number(number)) => text.parse() == Ok(*number),
            _ => value == allowed,
        };
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if same(value) => Ok(()),
            Some(other) => Err(unusable(key, other, &allowed.to_string())),
        }
    }
}

/// The error for a key of a scheduler's configuration: names key, value and what is allowed.
pub(crate) fn unusable(key: &str, value: &Value, allowed: &str) -> Error {
    Error::request(
        "scheduler",
        format!("`{key}` is {value} in the scheduler's configuration; supported: {allowed}"),
    )
}

/// Puts Python's bare `Infinity`, `-Infinity` and `NaN` into quotes.
fn quote_non_finite(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let token = ["-Infinity", "Infinity", "NaN"]
            .into_iter()
            .find(|t| !in_string && rest.starts_with(t));
        let taken = if let Some(token) = token {
            out.push('"');
            out.push_str(token);
            out.push('"');
            token.len()
        } else {
            // An escape inside a string takes its next character along, so that `\"` does not end the string.
            let escaped = in_string && first == '\\';
            let taken = rest
                .chars()
                .take(1 + usize::from(escaped))
                .map(char::len_utf8)
                .sum();
            in_string ^= first == '"';
            out.push_str(&rest[..taken]);
            taken
        };
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_infinities_are_read_outside_strings_only() {
        let config = SchedulerConfig::from_json(
            r#"{"lambda_min_clipped": -Infinity, "a": "x\"NaN", "b": [1, 2]}"#,
        )
        .unwrap();
        assert!(
            config
                .only("lambda_min_clipped", &Value::Number(f64::NEG_INFINITY))
                .is_ok()
        );
        assert!(
            config
                .only("lambda_min_clipped", &Value::Number(-5.1))
                .is_err()
        );
        assert_eq!(config.keys["a"], Value::Text("x\"NaN".into()));
        assert_eq!(config.numbers("b").unwrap(), Some(&[1.0, 2.0][..]));
    }

    #[test]
    fn unknown_keys_of_any_shape_are_tolerated() {
        let text = r#"{"_class_name": "DDIMScheduler", "_diffusers_version": "0.19", "x": {"y": ["z"]}, "t": null}"#;
        let config = SchedulerConfig::from_json(text).unwrap();
        assert_eq!(config.class_name(), Some("DDIMScheduler"));
        assert_eq!(config.number("t").unwrap(), None);
        assert!(config.number("x").is_err());
    }

    #[test]
    fn text_that_is_not_an_object_is_an_error() {
        assert!(SchedulerConfig::from_json("[1]").is_err());
        assert!(SchedulerConfig::from_json("{").is_err());
    }
}
