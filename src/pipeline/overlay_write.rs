//! Writes an overlay: one thread writes while the others merge, in memory for a few tensors.
//!
//! Twin: diffusers' `save_pretrained` after `fuse_lora`, which has the whole model in memory.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use safetensors::tensor::{Metadata, TensorInfo};

use super::overlay::{About, KEY, stored_name};
use crate::error::{Error, Result};
use crate::files::{Pending, write_large};
use crate::weights::{Dtype, Weights};

/// Safetensors files have their data at a multiple of this.
const ALIGNMENT: usize = 8;
/// Tensors in memory: one that is merged, one that is written, one between them.
const ROOMS: usize = 3;

/// A tensor on its way into an overlay.
pub(super) struct Merged<'a> {
    pub(super) component: &'a str,
    pub(super) tensor: &'a str,
    pub(super) shape: &'a [usize],
    /// The component's weights with their changes.
    pub(super) weights: &'a Weights,
}

/// The type that an overlay's values are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayType {
    /// Four bytes; a processor uses them where they lie.
    F32,
    /// Two bytes, rounded to nearest.
    F16,
}

impl FromStr for OverlayType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(format!("`{name}` is not known; known: f32, f16")),
        }
    }
}

impl OverlayType {
    const fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    const fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
        }
    }
}

/// Memory for one tensor's values, which serves one after the other.
struct Values {
    room: Room,
    /// How many of them are the tensor's.
    count: usize,
}

enum Room {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Values {
    fn new(kind: OverlayType) -> Self {
        let room = match kind {
            OverlayType::F32 => Room::F32(Vec::new()),
            OverlayType::F16 => Room::F16(Vec::new()),
        };
        Self { room, count: 0 }
    }

    /// Merges a tensor; `wide` is memory for its values before they are rounded.
    fn merge(&mut self, merged: &Merged<'_>, wide: &mut Vec<f32>) -> Result<()> {
        let Merged {
            tensor,
            shape,
            weights,
            ..
        } = merged;
        self.count = match &mut self.room {
            Room::F32(room) => weights.fill_f32(tensor, shape, room)?.len(),
            Room::F16(room) => weights.fill_f16(tensor, shape, wide, room)?.len(),
        };
        Ok(())
    }

    fn write(&self, to: &mut (dyn Write + Send)) -> io::Result<()> {
        let (native, width): (&[u8], usize) = match &self.room {
            Room::F32(room) => (bytemuck::cast_slice(&room[..self.count]), 4),
            Room::F16(room) => {
                let bits: &[u16] = room[..self.count].reinterpret_cast();
                (bytemuck::cast_slice(bits), 2)
            }
        };
        if cfg!(target_endian = "little") {
            return to.write_all(native);
        }
        for value in native.chunks_exact(width) {
            let little: Vec<u8> = value.iter().rev().copied().collect();
            to.write_all(&little)?;
        }
        Ok(())
    }
}

/// Bytes of the values of an overlay.
pub(super) fn value_bytes(tensors: &[Merged<'_>], kind: OverlayType) -> u64 {
    tensors.iter().map(|merged| merged.bytes(kind)).sum()
}

impl Merged<'_> {
    fn bytes(&self, kind: OverlayType) -> u64 {
        (self.shape.iter().product::<usize>() * kind.width()) as u64
    }
}

/// Writes an overlay beside its target. `on_merged` hears how many bytes of values are merged.
pub(super) fn write(
    target: &Path,
    about: &About,
    (tensors, kind): (&[Merged<'_>], OverlayType),
    on_merged: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Pending> {
    let header = header(about, tensors, kind).map_err(|source| Error::Output {
        path: target.to_owned(),
        source,
    })?;
    let mut stopped = None;
    let pending = write_large(target, |to| {
        to.write_all(&header)?;
        thread::scope(|scope| {
            let (ready, arriving) = sync_channel::<Values>(1);
            let (back, free) = channel();
            for _ in 0..ROOMS {
                // The other end is here.
                let _ = back.send(Values::new(kind));
            }
            let writer = scope.spawn(move || {
                arriving.into_iter().try_for_each(|values| {
                    values.write(to)?;
                    // Nobody takes the last ones back.
                    let _ = back.send(values);
                    Ok(())
                })
            });
            let merged = merge((tensors, kind), &free, &ready, on_merged);
            // The writer ends with what is left.
            drop(ready);
            let written = writer.join();
            written.unwrap_or_else(|_| Err(io::Error::other("the writing thread panicked")))?;
            merged.map_err(|error| {
                stopped = Some(error);
                io::Error::other("stopped")
            })
        })
    });
    pending.map_err(|error| stopped.unwrap_or(error))
}

/// Merges tensor after tensor into free memory, and hands it on; ends early where nobody takes it any more.
fn merge(
    (tensors, kind): (&[Merged<'_>], OverlayType),
    free: &Receiver<Values>,
    ready: &SyncSender<Values>,
    on_merged: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let (mut wide, mut done) = (Vec::new(), 0);
    for merged in tensors {
        let Ok(mut values) = free.recv() else { break };
        values.merge(merged, &mut wide)?;
        if ready.send(values).is_err() {
            break;
        }
        done += merged.bytes(kind);
        on_merged(done)?;
    }
    Ok(())
}

/// The length prefix and the header.
fn header(about: &About, tensors: &[Merged<'_>], kind: OverlayType) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.iter().map(|merged| {
        let start = end;
        end += merged.bytes(kind) as usize;
        let info = TensorInfo {
            dtype: kind.stored(),
            shape: merged.shape.to_vec(),
            data_offsets: (start, end),
        };
        (stored_name(merged.component, merged.tensor), info)
    });
    let about = HashMap::from([(KEY.to_owned(), serde_json::to_string(about)?)]);
    let metadata = Metadata::new(Some(about), infos.collect()).map_err(io::Error::other)?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}
