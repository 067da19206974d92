//! PEFT's configuration of an adapter, which diffusers writes into a file's metadata: ranks, alphas, and what else
//! changes the mathematics.
//!
//! Python twin: `LoraConfig` of PEFT as `_load_sft_state_dict_metadata` of diffusers reads it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::quoted;

/// Where diffusers keeps it.
const KEY: &str = "lora_adapter_metadata";
/// The components whose configurations stand in one file, longest first.
const COMPONENTS: &[&str] = &["text_encoder_2", "text_encoder", "unet"];
/// Ways to begin training that change the base model too, which a file of this format does not tell.
const CHANGED_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// The configurations in a file, by component; the empty name is that of a file for one model.
#[derive(Debug, Default)]
pub(super) struct Configs(BTreeMap<String, Config>);

#[derive(Debug, Deserialize)]
struct Config {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, usize>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, f64>>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    use_qalora: bool,
    #[serde(default)]
    init_lora_weights: Option<serde_json::Value>,
}

impl Configs {
    /// Reads the metadata; a file may have none. The error is the reason, without the path.
    pub(super) fn of(metadata: &BTreeMap<String, String>) -> Result<Self, String> {
        let Some(text) = metadata.get(KEY) else {
            return Ok(Self::default());
        };
        let fields: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|e| format!("metadata {}: {e}", quoted(KEY)))?;
        let mut by_component: BTreeMap<&str, serde_json::Map<_, _>> = BTreeMap::new();
        for (key, value) in &fields {
            let (component, field) = split(key);
            let config = by_component.entry(component).or_default();
            config.insert(field.to_owned(), value.clone());
        }
        let mut configs = BTreeMap::new();
        for (component, fields) in by_component {
            let config: Config = serde_json::from_value(fields.into())
                .map_err(|e| format!("metadata {}, {}: {e}", quoted(KEY), quoted(component)))?;
            config
                .check()
                .map_err(|reason| format!("metadata {}: {reason}", quoted(KEY)))?;
            configs.insert(component.to_owned(), config);
        }
        Ok(Self(configs))
    }

    /// Alpha, and alpha / rank (or alpha / √rank), of a module of this rank; `None` if nothing is said of it.
    pub(super) fn scale(&self, module: &str, rank: usize) -> Result<Option<(f64, f64)>, String> {
        let (component, module) = split(module);
        let Some(config) = self.0.get(component) else {
            return Ok(None);
        };
        let expected = matching(config.rank_pattern.as_ref(), module).unwrap_or(&config.r);
        if *expected != rank {
            return Err(format!(
                "has rank {rank}, and the file's metadata say {expected}: fetch the file again"
            ));
        }
        let alpha = *matching(config.alpha_pattern.as_ref(), module).unwrap_or(&config.lora_alpha);
        let rank = rank as f64;
        let divisor = if config.use_rslora { rank.sqrt() } else { rank };
        Ok(Some((alpha, alpha / divisor)))
    }
}

impl Config {
    fn check(&self) -> Result<(), String> {
        let patterns = self.alpha_pattern.iter().flatten();
        let alphas = patterns.map(|(_, alpha)| *alpha).chain([self.lora_alpha]);
        for alpha in alphas {
            if !alpha.is_finite() || alpha == 0.0 {
                return Err(format!("alpha is {alpha}, and must be finite and not zero"));
            }
        }
        if self.fan_in_fan_out || self.use_qalora {
            return Err(
                "`fan_in_fan_out` and `use_qalora` are not supported, and no SDXL model needs them"
                    .into(),
            );
        }
        if let Some(serde_json::Value::String(way)) = &self.init_lora_weights
            && CHANGED_BASE.iter().any(|changed| way.starts_with(changed))
        {
            return Err(format!(
                "training began with {}, which changes the base model too: convert the adapter to a plain LoRA \
                 (`path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`)",
                quoted(way)
            ));
        }
        let ranks = self.rank_pattern.iter().flatten().map(|(key, _)| key);
        let alphas = self.alpha_pattern.iter().flatten().map(|(key, _)| key);
        for pattern in ranks.chain(alphas) {
            if pattern.contains(['*', '+', '?', '[', '(', '|', '\\', '{']) {
                return Err(format!(
                    "pattern {} is a regular expression, and only names of modules are supported: list the modules",
                    quoted(pattern)
                ));
            }
        }
        Ok(())
    }
}

/// The component in front of a name, or the empty one, and the rest.
fn split(name: &str) -> (&str, &str) {
    for component in COMPONENTS {
        if let Some(rest) = name
            .strip_prefix(component)
            .and_then(|r| r.strip_prefix('.'))
        {
            return (component, rest);
        }
    }
    ("", name.strip_prefix("base_model.model.").unwrap_or(name))
}

/// The value of the first pattern that is a module's name or its end, as PEFT looks it up.
fn matching<'a, T>(patterns: Option<&'a BTreeMap<String, T>>, module: &str) -> Option<&'a T> {
    let ends = |pattern: &str| {
        let whole = pattern.strip_prefix('^');
        let pattern = whole.unwrap_or(pattern).trim_end_matches('$');
        match module.strip_suffix(pattern) {
            Some("") => true,
            Some(rest) => whole.is_none() && rest.ends_with('.'),
            None => false,
        }
    };
    let mut patterns = patterns?.iter();
    patterns
        .find(|(pattern, _)| ends(pattern))
        .map(|(_, value)| value)
}
