//! What LoRAs give a request in place of the model's defaults.

use std::collections::BTreeMap;

use super::super::{LoraUse, Request};
use crate::error::{Error, Result};
use crate::manifest::{Catalogue, LoraEntry, Model};

/// The field's name on the command line.
const FIELD: &str = "lora";

/// The catalogue's LoRAs that a request uses, with their names.
pub(super) type Named<'a> = Vec<(&'a str, &'a LoraEntry)>;

impl Request {
    /// The LoRAs of the catalogue that change anything, after all LoRAs have been checked.
    pub(super) fn named_loras<'a>(
        &'a self,
        catalogue: &'a Catalogue,
        model: &Model,
    ) -> Result<Named<'a>> {
        let mut named: Named<'a> = Vec::new();
        for lora in self.loras.iter().flatten() {
            lora.check()?;
            let Some(entry) = catalogue.loras.get(&lora.lora) else {
                continue;
            };
            entry
                .fits(model)
                .map_err(|reason| Error::request(FIELD, format!("`{}` {reason}", lora.lora)))?;
            if !lora.is_off() {
                named.push((&lora.lora, entry));
            }
        }
        self.check_agreement(&named)?;
        Ok(named)
    }

    /// Two LoRAs that give the request different values leave the choice to it.
    fn check_agreement(&self, named: &Named<'_>) -> Result<()> {
        let mut given: BTreeMap<String, (String, &str)> = BTreeMap::new();
        for (name, entry) in named {
            for (field, value) in settings(entry) {
                match given.get(&field) {
                    Some((earlier, by)) if *earlier != value && !self.says(&field) => {
                        let reason = format!(
                            "`{by}` wants {field} {earlier}, `{name}` {value}; say it in the request, or leave one out"
                        );
                        return Err(Error::request(FIELD, reason));
                    }
                    Some(_) => {}
                    None => {
                        given.insert(field, (value, name));
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the request itself decides what an entry calls `field`.
    fn says(&self, field: &str) -> bool {
        let lists = self.sigmas_list.is_some() || self.timesteps_list.is_some();
        match field {
            "width" => self.width.is_some(),
            "height" => self.height.is_some(),
            "steps" => self.steps.is_some() || lists,
            "guidance" => self.guidance.is_some() || self.guidance_list.is_some(),
            "scheduler" => self.scheduler.is_some(),
            "timestep_spacing" => self.spacing.is_some() || lists,
            _ => false,
        }
    }
}

impl LoraUse {
    fn check(&self) -> Result<()> {
        if self.lora.is_empty() {
            return Err(Error::request(FIELD, "names no file"));
        }
        // Weights are summed in f32.
        let scales = [Some(self.scale), self.te_scale];
        match scales
            .into_iter()
            .flatten()
            .find(|scale| !(*scale as f32).is_finite())
        {
            Some(scale) => Err(Error::request(
                FIELD,
                format!("`{}`: the scale {scale} is no finite number", self.lora),
            )),
            None => Ok(()),
        }
    }
}

/// Everything that an entry gives a request, as text.
fn settings(entry: &LoraEntry) -> impl Iterator<Item = (String, String)> {
    let defaults = &entry.defaults;
    let number = |value: Option<usize>| value.map(|value| value.to_string());
    let own = [
        ("width", number(defaults.width)),
        ("height", number(defaults.height)),
        ("steps", number(defaults.steps)),
        ("guidance", defaults.guidance.map(|value| value.to_string())),
        (
            "scheduler",
            defaults.scheduler.map(|value| value.to_string()),
        ),
    ];
    let own = own
        .into_iter()
        .filter_map(|(field, value)| Some((field.to_owned(), value?)));
    let scheduler = entry.scheduler.settings();
    own.chain(scheduler.map(|(key, value)| (key.to_owned(), value.to_string())))
}

/// The model as a request with these LoRAs sees it: its scheduler's configuration and defaults.
pub(super) fn changed(model: &Model, named: &Named<'_>) -> Model {
    let mut model = model.clone();
    for (_, entry) in named {
        model.scheduler = model.scheduler.overridden_by(&entry.scheduler);
        model.defaults.take(&entry.defaults);
    }
    model
}

/// The steps that the model called `name` and the LoRAs were distilled for.
pub(super) fn distilled(name: &str, model: &Model, named: &Named<'_>) -> Vec<(String, usize)> {
    let loras = named
        .iter()
        .map(|(name, lora)| (*name, lora.distilled_steps));
    let all = std::iter::once((name, model.distilled_steps)).chain(loras);
    all.filter_map(|(name, steps)| Some((name.to_owned(), steps?)))
        .collect()
}
