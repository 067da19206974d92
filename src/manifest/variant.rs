//! Variants in the catalogue: models that are another one but for some weights, defaults and keys of the scheduler.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Error as _, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::lora::{check_guidance, check_keys};
use super::{DefaultsOver, FileRef, Model};
use crate::schedule::SchedulerConfig;

/// The key that makes an entry a variant.
pub(super) const LIKE: &str = "like";
/// Longest way from a variant of a variant to a whole entry.
const MAX_DEPTH: usize = 8;

/// An entry as it is written.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    /// It says everything.
    Whole(Box<Model>),
    /// It says in what it differs from the entry of this name.
    Variant(String, Box<Variant>),
}

/// In what a model differs from another one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Variant {
    /// Where the weights come from that it replaces.
    #[serde(default)]
    origin: Option<String>,
    /// Their licence, if known.
    #[serde(default)]
    licence: Option<String>,
    /// Weight files of the components that it replaces.
    #[serde(default)]
    weights: BTreeMap<String, Vec<FileRef>>,
    /// A whole model in one file, in place of the base's weights. What is under `weights` comes before it.
    #[serde(default)]
    checkpoint: Option<FileRef>,
    /// Keys that it replaces in the configuration of the scheduler.
    #[serde(default)]
    scheduler: SchedulerConfig,
    /// Defaults that it replaces.
    #[serde(default)]
    defaults: DefaultsOver,
    /// As [`Model::distilled_steps`].
    #[serde(default)]
    distilled_steps: Option<usize>,
}

impl Variant {
    /// The model that it makes of `model`, which is called `like`.
    fn of(&self, like: &str, mut model: Model) -> Result<Model, String> {
        if let Some(unknown) = self
            .weights
            .keys()
            .find(|key| model.weight_files(key).is_empty())
        {
            let known = model.weights.keys().map(String::as_str);
            return Err(format!(
                "weights.{unknown}: `{like}` has no weights of that name; it has: {}",
                known.collect::<Vec<_>>().join(", ")
            ));
        }
        check_keys(&self.scheduler)?;
        check_guidance(self.defaults.guidance)?;
        if !self.weights.is_empty() || self.checkpoint.is_some() {
            // Who made the base has not licensed these.
            model.licence = None;
        }
        model.licence = self.licence.clone().or(model.licence);
        model.origin = self.origin.clone().unwrap_or(model.origin);
        if let Some(file) = &self.checkpoint {
            model = model.with_checkpoint(file.clone());
        }
        model.weights.extend(self.weights.clone());
        model.scheduler = model.scheduler.overridden_by(&self.scheduler);
        model.defaults.take(&self.defaults);
        model.distilled_steps = self.distilled_steps.or(model.distilled_steps);
        model.like = Some(like.to_owned());
        Ok(model)
    }
}

/// The model that the entry called `name` makes, which may be a variant of others.
pub(super) fn whole(name: &str, entries: &BTreeMap<String, Entry>) -> Result<Model, String> {
    let mut variants = Vec::<(&str, &Variant)>::new();
    let mut at = name;
    let mut model = loop {
        let (like, variant) = match entries.get(at) {
            Some(Entry::Whole(model)) => break (**model).clone(),
            Some(Entry::Variant(like, variant)) => (like, variant),
            None => {
                let known = entries.keys().map(String::as_str).collect::<Vec<_>>();
                return Err(format!(
                    "{LIKE}: no model `{at}`; known: {}",
                    known.join(", ")
                ));
            }
        };
        variants.push((like, variant));
        if variants.len() > MAX_DEPTH {
            return Err(format!(
                "{LIKE}: leads to no whole entry in {MAX_DEPTH} steps, or in a circle"
            ));
        }
        at = like;
    };
    for (like, variant) in variants.into_iter().rev() {
        model = variant.of(like, model)?;
    }
    Ok(model)
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

/// Decides by the first key, so that errors keep their line.
struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a model, or a variant that begins with `{LIKE}`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let Some(first) = map.next_key::<String>()? else {
            return Err(A::Error::custom("is empty"));
        };
        if first == LIKE {
            let like = map.next_value()?;
            let variant = Variant::deserialize(MapAccessDeserializer::new(map))?;
            return Ok(Entry::Variant(like, Box::new(variant)));
        }
        let again = Again {
            first: Some(first),
            rest: map,
        };
        Model::deserialize(MapAccessDeserializer::new(again))
            .map(|model| Entry::Whole(Box::new(model)))
    }
}

/// A map whose first key has been looked at already.
struct Again<A> {
    first: Option<String>,
    rest: A,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Again<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        match self.first.take() {
            Some(first) => seed.deserialize(first.into_deserializer()).map(Some),
            None => self.rest.next_key_seed(seed),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.rest.next_value_seed(seed)
    }
}
