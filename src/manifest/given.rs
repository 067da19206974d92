//! Entries that a catalogue gets while others hold on to those it has: the models of files that requests name.
//!
//! No Python twin: diffusers makes a pipeline of each file.

use std::sync::OnceLock;

use super::Model;

/// A list that only grows, so that what was found in it stays where it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Given(OnceLock<Box<Entry>>);

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    model: Model,
    next: Given,
}

impl Given {
    pub(super) fn get(&self, name: &str) -> Option<&Model> {
        let mut entry = self.0.get()?;
        while entry.name != name {
            entry = entry.next.0.get()?;
        }
        Some(&entry.model)
    }

    pub(super) fn add(&self, name: String, model: Model) {
        let mut new = Box::new(Entry {
            name,
            model,
            next: Self::default(),
        });
        let mut end = self;
        while let Err(refused) = end.0.set(new) {
            new = refused;
            if let Some(entry) = end.0.get() {
                end = &entry.next;
            }
        }
    }
}
