//! LoRAs merged into an overlay, which later runs use where it lies.
//!
//! Twin: diffusers' `fuse_lora` with `save_pretrained`.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;

use super::Pipeline;
use super::overlay::About;
use super::overlay_write::{self, Merged, OverlayType};
use crate::error::{Error, Result};
use crate::files::{Pending, free_space_for};
use crate::progress::{Event, Observer, Stage};
use crate::request::{LoraSet, LoraUse};
use crate::weights::{Weights, readable_size};

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
    /// [`Error::Request`] if nothing is merged; [`Error::Output`] if the disk has no room for it; those of opening LoRAs and of writing; [`Error::Cancelled`].
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
        let mut components: BTreeMap<&str, Weights> = BTreeMap::new();
        for (component, mut weights) in self.targets(&set.model, observer)? {
            let Some((name, changed)) = changed.get_key_value(&component) else {
                continue;
            };
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
            bytes: overlay_write::value_bytes(&tensors, kind),
        };
        check_space(target, report.bytes, kind)?;
        let mut bases = BTreeMap::new();
        for (component, weights) in &components {
            let key = self.content_key(weights, (&set.model, component), observer)?;
            bases.insert((*component).to_owned(), key);
        }
        let about = About::new(&set.model, bases, set.uses.iter().map(named).collect());
        let what = format!("LoRAs into {}", target.display());
        self.begin_stage(observer, Stage::Merge, &what)?;
        let total = report.bytes;
        let pending = overlay_write::write(target, &about, (&tensors, kind), &mut |done| {
            let what = "merging";
            self.notify(observer, Event::Expansion { what, done, total }, 0)
        })?;
        Ok((pending, report))
    }
}

/// Finds out before the work, not after it, that the disk has no room.
fn check_space(target: &Path, needed: u64, kind: OverlayType) -> Result<()> {
    let free = free_space_for(target);
    if needed <= free {
        return Ok(());
    }
    let narrower = match kind {
        OverlayType::F32 => ", or use --dtype f16, which takes half",
        OverlayType::F16 => "",
    };
    let reason = format!(
        "{} are free, and the merged tensors have {} ({needed} bytes): free space, name a file on another disk{narrower}",
        readable_size(free),
        readable_size(needed)
    );
    Err(Error::Output {
        path: target.to_owned(),
        source: io::Error::new(ErrorKind::StorageFull, reason),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_with_bytes_file_and_remedies() {
        let target = std::env::temp_dir()
            .join("not made yet")
            .join("o.safetensors");
        check_space(&target, 1, OverlayType::F32).unwrap();
        for (kind, halved) in [(OverlayType::F32, true), (OverlayType::F16, false)] {
            let error = check_space(&target, u64::MAX, kind).unwrap_err();
            assert_eq!(error.code(), 7, "{error}");
            let message = error.to_string();
            assert_eq!(message.contains("--dtype f16"), halved, "{message}");
            for part in [
                target.to_str().unwrap(),
                "are free",
                "18446744073709551615 bytes",
                "free space",
                "another disk",
            ] {
                assert!(message.contains(part), "no {part:?} in: {message}");
            }
        }
        assert!(!target.parent().unwrap().exists());
    }
}
