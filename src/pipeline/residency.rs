//! Which networks stay in memory, and which memory mode a request runs in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use super::Pipeline;
use super::components::Part;
use super::loras::Loading;
use crate::error::Result;
use crate::memory::{self, MemoryMode, Need};
use crate::plan::names;
use crate::progress::{Event, Observer};
use crate::provider::Provider;
use crate::request::Resolved;
use crate::runtime::Session;

/// A network of a pipeline: a session and what it was made for.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) session: Session,
    key: Key,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    model: String,
    component: String,
    skip: usize,
    memory: MemoryMode,
    /// What LoRAs make of its weights.
    loras: Vec<(String, u64)>,
}

/// Networks that wait for their next use.
#[derive(Debug, Default)]
pub(super) struct Residents(Mutex<BTreeMap<Key, Session>>);

impl Residents {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<Key, Session>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Pipeline {
    /// A network of a model: one that waits, or a new one.
    pub(super) fn network<'a>(
        &self,
        model: &str,
        part: impl Into<Part<'a>>,
        loading: &Loading,
        observer: &mut Observer<'_>,
    ) -> Result<Network> {
        let part = part.into();
        let key = Key {
            model: model.to_owned(),
            component: part.component.to_owned(),
            skip: part.skip,
            memory: loading.memory,
            loras: self.marks(model, part.component, loading)?,
        };
        let session = match self.residents.change(|waiting| waiting.remove(&key)) {
            Some(session) => session,
            None => self.session(model, part, loading, observer)?,
        };
        Ok(Network { session, key })
    }

    /// What LoRAs make of a component's weights, as far as it tells networks apart.
    fn marks(&self, model: &str, component: &str, loading: &Loading) -> Result<Vec<(String, u64)>> {
        let entry = self
            .catalogue()
            .model("model", model)?
            .graphs
            .get(component);
        let changed = entry.and_then(|entry| loading.changed(model, &entry.weights));
        Ok(changed.map_or_else(Vec::new, |changed| changed.marks().to_vec()))
    }

    /// Gives a network back: it waits for its next use where the mode keeps networks, and is dropped elsewhere.
    pub(super) fn give_back(&self, network: Network) {
        if network.key.memory.keeps_networks() {
            self.residents
                .change(|waiting| waiting.insert(network.key, network.session));
        }
    }

    /// Settles the request's memory mode, tells which one was chosen where it names none, and drops networks that this
    /// request has no use for.
    pub(super) fn settle_memory(
        &self,
        resolved: &mut Resolved,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let mode = if let Some(mode) = resolved.request.memory {
            mode
        } else {
            let (mode, why) = self.choose_memory(resolved, observer)?;
            let note = format!("memory mode {mode}: {why}");
            self.notify(observer, Event::Note(&note), 0)?;
            mode
        };
        let decoder = self
            .catalogue()
            .model("model", Self::decoder_of(resolved))?;
        resolved.settle_memory(mode, decoder.vae.sample_size);
        let refiner = resolved.refine.as_ref().map(|(refiner, _)| refiner);
        let mut unets = BTreeMap::new();
        for model in [Some(&resolved.model), refiner].into_iter().flatten() {
            unets.insert(model, unet_of(resolved, model));
        }
        let loading = self.loading(mode, &resolved.lora_set(), observer)?;
        self.residents.change(|waiting| {
            waiting.retain(|key, _| {
                // The other form of a UNet would hold the largest weights twice, and so would other LoRAs.
                let wanted = unets
                    .get(&key.model)
                    .is_some_and(|unet| !names::is_unet(&key.component) || *unet == key.component);
                let marks = self.marks(&key.model, &key.component, &loading);
                key.memory == mode && wanted && marks.is_ok_and(|marks| marks == key.loras)
            });
        });
        Ok(())
    }

    fn choose_memory(
        &self,
        resolved: &Resolved,
        observer: &mut Observer<'_>,
    ) -> Result<(MemoryMode, String)> {
        let provider = self.runtime().provider();
        if provider != Provider::Cpu {
            let why = format!("the default of provider {provider}");
            return Ok((MemoryMode::Balanced, why));
        }
        let Some(available) = memory::available() else {
            let why = "this system does not tell how much memory is free".to_owned();
            return Ok((MemoryMode::Balanced, why));
        };
        let need = self.need(resolved, observer)?;
        let mode = need.fastest_in(available);
        let mut why = format!(
            "{} free, of which it wants {}",
            gib(available),
            gib(need.of(mode))
        );
        if let Some(faster) = MemoryMode::ALL.into_iter().find(|m| *m > mode) {
            why = format!("{why}; {faster} would want {}", gib(need.of(faster)));
        }
        Ok((mode, why))
    }

    /// What the networks of a request need, by the weights that their graphs name and those that LoRAs change.
    ///
    /// # Errors
    /// Those of [`Pipeline::graph`] and of opening LoRAs.
    pub fn need(&self, resolved: &Resolved, observer: &mut Observer<'_>) -> Result<Need> {
        let loading = self.loading(resolved.memory(), &resolved.lora_set(), observer)?;
        let mut need = Need {
            pixels: (resolved.size.width * resolved.size.height) as u64,
            ..Need::default()
        };
        let refiner = resolved.refine.as_ref().map(|(name, _)| name.as_str());
        for name in [Some(resolved.model.as_str()), refiner]
            .into_iter()
            .flatten()
        {
            for component in self.components(resolved, name)? {
                let graph = self.graph(name, &component)?;
                let key = &self.catalogue().model("model", name)?.graphs[&component].weights;
                let changed = loading.changed(name, key);
                let changed = changed.map_or(0, |changed| changed.bytes(key, &graph));
                need.add(graph.weight_bytes(), changed);
            }
        }
        Ok(need)
    }

    /// The components of a model that a request runs.
    fn components(&self, resolved: &Resolved, name: &str) -> Result<BTreeSet<String>> {
        let model = self.catalogue().model("model", name)?;
        let mut components = model
            .text
            .iter()
            .map(|t| t.encoder.clone())
            .collect::<BTreeSet<_>>();
        components.extend([names::KV, unet_of(resolved, name)].map(str::to_owned));
        for (_, prompt) in resolved.image_prompts(name) {
            let adapter = &prompt.adapter;
            components.extend(model.adapter(adapter)?.image_encoder.clone());
            components.extend([names::projection(adapter), names::adapter_kv(adapter)]);
        }
        if name == Self::decoder_of(resolved) {
            components.insert(names::VAE_DECODER.to_owned());
        }
        Ok(components)
    }
}

/// The form of a model's UNet that a request runs.
fn unet_of(resolved: &Resolved, model: &str) -> &'static str {
    match resolved.image_prompts(model).next() {
        Some(_) => names::UNET_IMAGE,
        None => names::UNET,
    }
}

/// Bytes in GiB, for people.
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
