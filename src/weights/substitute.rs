//! Tensors out of another file than a component's own, such as an overlay of merged weights, used where they lie there.
//!
//! Python twin: `state_dict.update(...)`, without the copies.

use std::sync::Arc;

use super::expansion::records::Source;
use super::mapping::Mapping;
use super::{Fault, Stored, Weights};
use crate::error::Result;

impl Weights {
    /// Takes a tensor out of `other`, where it is called `its_name`, in place of the stored one; changes are applied to it.
    /// Clones made before are not affected.
    ///
    /// # Errors
    /// [`Error::Weights`](crate::Error::Weights) if one of them has no such tensor, `other`'s has another shape, or is
    /// stored as something else than f32, f16 or bf16.
    pub fn substitute(&mut self, name: &str, other: &Self, its_name: &str) -> Result<()> {
        let own = self.tensors.get(name);
        let own = own.ok_or_else(|| self.error(name, &[], &Fault::Absent))?;
        let stored = other
            .fitting(its_name, &own.shape)
            .map_err(|fault| other.error(its_name, &own.shape, &fault))?;
        let map = Arc::clone(&other.files[stored.file]);
        self.replaced.insert(name.to_owned(), (map, stored.clone()));
        Ok(())
    }

    /// Where a tensor's values are taken from.
    pub(super) fn source<'a>(
        &'a self,
        name: &str,
        stored: &'a Stored,
    ) -> (&'a Arc<Mapping>, &'a Stored) {
        match self.replaced.get(name) {
            Some((map, stored)) => (map, stored),
            None => (&self.files[stored.file], stored),
        }
    }

    /// What the system said of the files when they were opened: another text for another or a changed file.
    pub fn stamp(&self) -> String {
        let files = self.files.iter().map(|map| match &map.meta {
            Some(meta) => format!("{:?}", Source::of(&map.path, meta)),
            None => map.path.display().to_string(),
        });
        files.collect::<Vec<_>>().join("\n")
    }
}
