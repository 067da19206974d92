//! LoRAs merged into an overlay, which later runs use where it lies.
//!
//! Twin: diffusers' `fuse_lora` with `save_pretrained`.

use std::collections::BTreeMap;
use std::path::Path;

use super::Pipeline;
use super::overlay::{self, About, Merged, OverlayType};
use crate::error::{Error, Result};
use crate::files::Pending;
use crate::progress::{Event, Observer, Stage};
use crate::request::{LoraSet, LoraUse};
use crate::weights::Weights;

/// What an overlay holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MergeReport {
    /// Tensors by component.
    pub tensors: BTreeMap<String, usize>,
    /// Bytes of their values.
    pub bytes: u64,
}

impl Pipeline {
    /// Merges LoRAs with the model's weights that they change, and writes those as an overlay beside `target`, tensor by
    /// tensor: memory for a few of them is enough. [`Pending::publish`] puts the file in place.
    ///
    /// # Errors
    /// [`Error::Request`] if nothing is merged; those of opening LoRAs and of writing; [`Error::Cancelled`].
    pub fn merge_loras(
        &self,
        set: &LoraSet,
        (target, kind): (&Path, OverlayType),
        observer: &mut Observer<'_>,
    ) -> Result<(Pending, MergeReport)> {
        let applied = self.open_loras(set, observer)?;
        let changed = applied.as_ref().map(|applied| applied.components());
        let Some(changed) = changed.filter(|changed| !changed.is_empty()) else {
            let reason = "there is nothing to merge: name a LoRA with a scale that is not 0";
            return Err(Error::request("lora", reason));
        };
        let mut bases = BTreeMap::new();
        let mut components: BTreeMap<&str, Weights> = BTreeMap::new();
        for (component, mut weights) in self.targets(&set.model, observer)? {
            let Some((name, changed)) = changed.get_key_value(&component) else {
                continue;
            };
            let key = self.content_key(&weights, (&set.model, &component), observer)?;
            bases.insert(component, key);
            changed.attach(name, &mut weights)?;
            components.insert(name, weights);
        }
        let mut tensors = Vec::new();
        for (component, weights) in &components {
            for tensor in changed[*component].tensors() {
                let shape = weights.shape(tensor).unwrap_or_default();
                tensors.push(Merged {
                    component,
                    tensor,
                    shape,
                    weights,
                });
            }
        }
        let report = MergeReport {
            tensors: components
                .keys()
                .map(|c| ((*c).to_owned(), changed[*c].tensors().len()))
                .collect(),
            bytes: overlay::value_bytes(&tensors, kind),
        };
        let about = About::new(&set.model, bases, set.uses.iter().map(named).collect());
        let what = format!("LoRAs into {}", target.display());
        self.begin_stage(observer, Stage::Merge, &what)?;
        let total = report.bytes;
        let pending = overlay::write(target, &about, (&tensors, kind), &mut |done| {
            let what = "merging";
            self.notify(observer, Event::Expansion { what, done, total }, 0)
        })?;
        Ok((pending, report))
    }
}

/// A LoRA without its folder, which is nobody else's business.
fn named(lora: &LoraUse) -> LoraUse {
    let name = Path::new(&lora.lora).file_name();
    let name = name.map_or(lora.lora.clone(), |name| {
        name.to_string_lossy().into_owned()
    });
    LoraUse {
        lora: name,
        ..lora.clone()
    }
}
