//! Writes an expansion: in parallel, in bounded memory, whole or not at all.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::super::Weights;
use super::super::data::{Widen, widener};
use super::{ELSEWHERE, Expanding, OnExpanding, cannot_write, key_field, readable_size, records};
use crate::error::{Error, Result};
use crate::files::{free_space, write_pending};

/// Values that are widened at a time, while the ones before are written: twice this is the memory that it takes.
const BATCH: usize = 8 << 20;
/// Safetensors files have their data at a multiple of this.
const ALIGNMENT: usize = 8;

/// What an expansion of some weights holds.
pub(super) struct Layout {
    /// What is expanded, by name.
    pub(super) tensors: BTreeMap<String, Source>,
    pieces: Vec<Piece>,
}

/// A tensor of the weight files.
pub(super) struct Source {
    pub(super) shape: Vec<usize>,
    /// The number of its file, and its first byte there.
    pub(super) place: (usize, usize),
}

/// A tensor on its way, in the order of the source's bytes.
#[derive(Clone)]
struct Piece {
    name: String,
    file: usize,
    range: Range<usize>,
    widen: Widen,
}

impl Layout {
    /// The expansion of all f16 and bf16 tensors in the files of `weights`: of a whole model those of all components, so
    /// that one file serves them.
    pub(super) fn of(weights: &Weights) -> Self {
        let mut pieces = Vec::new();
        let mut tensors = BTreeMap::new();
        let whole = weights.whole.as_deref();
        for (name, stored) in whole.unwrap_or(&weights.tensors) {
            let Some(widen) = widener(stored.dtype) else {
                continue;
            };
            let source = Source {
                shape: stored.shape.clone(),
                place: (stored.file, stored.range.start),
            };
            tensors.insert(name.clone(), source);
            pieces.push(Piece {
                name: name.clone(),
                file: stored.file,
                range: stored.range.clone(),
                widen,
            });
        }
        pieces.sort_by_key(|piece| (piece.file, piece.range.start));
        Self { tensors, pieces }
    }

    /// The length prefix and the header.
    fn header(&self, key: &str) -> io::Result<Vec<u8>> {
        let mut end = 0;
        let infos = self.pieces.iter().map(|piece| {
            let start = end;
            end += piece.range.len() * 2;
            let info = TensorInfo {
                dtype: Dtype::F32,
                shape: self.tensors[&piece.name].shape.clone(),
                data_offsets: (start, end),
            };
            (piece.name.clone(), info)
        });
        let metadata =
            Metadata::new(Some(key_field(key)), infos.collect()).map_err(io::Error::other)?;
        let mut json = serde_json::to_vec(&metadata)?;
        json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
        Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
    }

    /// Bytes of all values.
    fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.range.len() as u64 * 2).sum()
    }

    /// The pieces, cut and joined to batches of at most [`BATCH`] values.
    fn batches(&self) -> Vec<Vec<Piece>> {
        let (mut batches, mut room) = (Vec::new(), 0);
        for piece in &self.pieces {
            let mut rest = piece.range.clone();
            while !rest.is_empty() {
                if room == 0 {
                    batches.push(Vec::new());
                    room = BATCH * 2;
                }
                let cut = rest.start + rest.len().min(room);
                if let Some(batch) = batches.last_mut() {
                    batch.push(Piece {
                        range: rest.start..cut,
                        ..piece.clone()
                    });
                }
                room -= cut - rest.start;
                rest.start = cut;
            }
        }
        batches
    }
}

/// Writes the expansion of `weights` to `target`. The caller holds the folder's lock.
pub(super) fn write(
    target: &Path,
    key: &str,
    layout: &Layout,
    weights: &Weights,
    on_expanding: &mut OnExpanding<'_>,
) -> Result<()> {
    let folder = target.parent().unwrap_or(target);
    let total = layout.bytes();
    let header = layout.header(key).map_err(|e| cannot_write(target, e))?;
    let needed = header.len() as u64 + total;
    check_space(folder, needed)?;
    on_expanding(Expanding::Writing {
        folder,
        done: 0,
        total,
    })?;
    let mut stopped = None;
    let pending = write_pending(target, |to| {
        to.write_all(&header)?;
        pour(to, layout, weights, &mut |done| {
            on_expanding(Expanding::Writing {
                folder,
                done,
                total,
            })
            .map_err(|error| {
                stopped = Some(error);
                io::Error::other("stopped")
            })
        })
    });
    let pending = pending.map_err(|error| stopped.unwrap_or_else(|| explained(error, needed)))?;
    records::check_unchanged(weights)?;
    pending.publish().map_err(|e| explained(e, needed))
}

/// Widens batch after batch while the one before is written. One thread writes, because the system lets only one write to
/// a file at a time anyway.
fn pour(
    to: &mut (dyn Write + Send),
    layout: &Layout,
    weights: &Weights,
    on_written: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    let mut done = 0;
    // One turn more than there are batches, for the last one's writing.
    for batch in layout.batches().iter().map(Some).chain([None]) {
        let (written, ()) = rayon::join(
            || to.write_all(bytemuck::cast_slice(&ready)),
            || widen(weights, batch.map_or(&[], Vec::as_slice), &mut next),
        );
        written?;
        done += ready.len() as u64 * 4;
        on_written(done)?;
        std::mem::swap(&mut ready, &mut next);
    }
    Ok(())
}

fn widen(weights: &Weights, batch: &[Piece], to: &mut Vec<f32>) {
    let count = batch.iter().map(|piece| piece.range.len() / 2).sum();
    to.resize(count, 0.0);
    let mut rest = to.as_mut_slice();
    for piece in batch {
        let (values, later) = rest.split_at_mut(piece.range.len() / 2);
        let bytes = &weights.files[piece.file].bytes()[piece.range.clone()];
        (piece.widen)(bytes, values);
        rest = later;
    }
}

/// Finds out before the work, not after it, that the disk has no room.
fn check_space(folder: &Path, needed: u64) -> Result<()> {
    let free = free_space(folder);
    if needed <= free {
        return Ok(());
    }
    let reason = format!("{} are free", readable_size(free));
    Err(explained(
        cannot_write(folder, io::Error::new(ErrorKind::StorageFull, reason)),
        needed,
    ))
}

/// An error of writing with what was to be written and what helps.
fn explained(error: Error, needed: u64) -> Error {
    match error {
        Error::Output { path, source } => {
            let what = readable_size(needed);
            let reason = format!(
                "{source}, and {what} ({needed} bytes) are needed to expand the checkpoint's weights to f32: free \
                 space, use the checkpoint's f32 file, or {ELSEWHERE}"
            );
            Error::Output {
                path,
                source: io::Error::new(source.kind(), reason),
            }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_with_bytes_folder_and_remedies() {
        let folder = std::env::temp_dir();
        check_space(&folder, 1).unwrap();
        let message = check_space(&folder, u64::MAX).unwrap_err().to_string();
        for part in [
            folder.to_str().unwrap(),
            "are free",
            "18446744073709551615 bytes",
            "free space",
            "TRONIE_CACHE",
            "f32 file",
        ] {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
    }
}
