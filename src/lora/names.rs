//! The names that every format has for a model's modules.
//!
//! Kohya joins a module's name with underscores, which cannot be undone (`to_out_0`); so the names are built from the
//! model's own modules and looked up.
//!
//! Python twin: `_maybe_map_sgm_blocks_to_diffusers` and `_convert_unet_lora_key` in diffusers, the other way round.

use std::collections::{BTreeMap, HashMap};

use crate::weights::{UnetNames, Weights};

/// A module of one of the model's components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) component: String,
    /// Its name in the component, without `.weight`.
    pub(super) module: String,
}

/// Modules by every name that a LoRA may have for them.
#[derive(Debug)]
pub(super) struct Names(HashMap<String, Place>);

impl Names {
    /// The names of the modules of some components, by key into the model's weights.
    pub(super) fn of(targets: &BTreeMap<String, &Weights>) -> Self {
        let mut names = HashMap::new();
        for (component, weights) in targets {
            let original = UnetNames::of(weights.names());
            let modules = weights.names().filter_map(|n| n.strip_suffix(".weight"));
            for module in modules {
                let spellings = match component.as_str() {
                    "unet" => unet(module, &original),
                    "text_encoder" => text_encoder(module, "text_encoder", "lora_te1"),
                    "text_encoder_2" => text_encoder(module, "text_encoder_2", "lora_te2"),
                    _ => Vec::new(),
                };
                for name in spellings {
                    let place = Place {
                        component: component.clone(),
                        module: module.to_owned(),
                    };
                    names.insert(name, place);
                }
            }
        }
        Self(names)
    }

    /// The module that a file's name means.
    pub(super) fn find(&self, name: &str) -> Option<&Place> {
        self.0.get(name)
    }
}

fn unet(module: &str, original: &UnetNames) -> Vec<String> {
    let joined = module.replace('.', "_");
    let mut names = vec![
        module.to_owned(),
        format!("unet.{module}"),
        format!("base_model.model.{module}"),
        format!("lora_unet_{joined}"),
        format!("lycoris_{joined}"),
    ];
    if let Some(original) = original.original(module) {
        names.push(format!("lora_unet_{}", original.replace('.', "_")));
        names.push(format!("diffusion_model.{original}"));
    }
    names
}

/// Checkpoints and LoRAs have `text_model.` before a module's name or leave it away, in any combination.
fn text_encoder(module: &str, dotted: &str, kohya: &str) -> Vec<String> {
    let short = module.strip_prefix("text_model.").unwrap_or(module);
    let long = format!("text_model.{short}");
    [short, &long]
        .into_iter()
        .flat_map(|name| {
            let joined = name.replace('.', "_");
            [format!("{dotted}.{name}"), format!("{kohya}_{joined}")]
        })
        .collect()
}
