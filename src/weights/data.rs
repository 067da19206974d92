//! The values of one tensor as f32: in place where the file allows it, converted where it does not.
//!
//! Python twin: `safe_open(...).get_tensor(name).float()`.

use std::ops::Range;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::mapping::Mapping;

/// Values per unit of parallel work: enough to outweigh the scheduling, small enough to stay in the cache.
const CHUNK: usize = 1 << 15;
/// Values per narrow block on the stack.
const BLOCK: usize = 256;

/// A tensor's f32 values with their shape. Clones share the values, and keep the file mapped if the values lie in it.
#[derive(Debug, Clone)]
pub struct WeightData {
    shape: Vec<usize>,
    values: Values,
}

#[derive(Debug, Clone)]
enum Values {
    /// f32, aligned and in this machine's byte order: [`WeightData::read`] makes no other.
    Mapped(Arc<Mapping>, Range<usize>),
    Owned(Arc<Vec<f32>>),
}

impl WeightData {
    /// The values at `range` of a file, or `None` if their type is not one that widens to f32 exactly.
    pub(super) fn read(
        map: &Arc<Mapping>,
        range: Range<usize>,
        dtype: Dtype,
        shape: Vec<usize>,
    ) -> Option<Self> {
        let bytes = &map.bytes()[range.clone()];
        let values = match dtype {
            Dtype::F32
                if cfg!(target_endian = "little")
                    && bytemuck::try_cast_slice::<u8, f32>(bytes).is_ok() =>
            {
                Values::Mapped(Arc::clone(map), range)
            }
            Dtype::F32 => Values::Owned(owned(bytes, bytes.len() / 4, |from, to| {
                convert(from, to, copy_f32);
            })),
            _ => Values::Owned(owned(bytes, bytes.len() / 2, widener(dtype)?)),
        };
        Some(Self { shape, values })
    }

    /// Values that lie in no file. The caller has checked that there are as many as `shape` says.
    pub(super) fn owned(shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self {
            shape,
            values: Values::Owned(Arc::new(values)),
        }
    }

    /// The dimensions; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values in row-major order.
    pub fn as_slice(&self) -> &[f32] {
        match &self.values {
            Values::Mapped(map, range) => bytemuck::cast_slice(&map.bytes()[range.clone()]),
            Values::Owned(values) => values,
        }
    }

    /// Where the values begin. The address stays valid and the same for as long as this value or a clone of it lives.
    pub fn as_ptr(&self) -> *const f32 {
        self.as_slice().as_ptr()
    }

    /// Whether the values lie in the mapped file, so that they cost no memory of their own.
    pub fn is_mapped(&self) -> bool {
        matches!(self.values, Values::Mapped(..))
    }
}

/// Fills as many f32 values as there are, from their bytes in a file, in parallel.
pub(super) type Widen = fn(&[u8], &mut [f32]);

/// What widens a type of two bytes to f32, exactly; `None` for every other type.
pub(super) fn widener(dtype: Dtype) -> Option<Widen> {
    match dtype {
        Dtype::F16 => Some(|from, to| convert(from, to, widen_f16)),
        Dtype::BF16 => Some(|from, to| convert(from, to, widen_bf16)),
        _ => None,
    }
}

fn owned(bytes: &[u8], count: usize, widen: Widen) -> Arc<Vec<f32>> {
    let mut values = vec![0.0; count];
    widen(bytes, &mut values);
    Arc::new(values)
}

/// Converts `bytes`, `WIDTH` to a value, in parallel.
fn convert<const WIDTH: usize>(bytes: &[u8], to: &mut [f32], each: fn(&[[u8; WIDTH]], &mut [f32])) {
    let (narrow, _) = bytes.as_chunks::<WIDTH>();
    to.par_chunks_mut(CHUNK)
        .zip(narrow.par_chunks(CHUNK))
        .for_each(|(to, from)| each(from, to));
}

fn copy_f32(from: &[[u8; 4]], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_le_bytes(*from);
    }
}

// In blocks, because the slice conversions of `half` use the processor's instructions and the scalar ones ask each time
// whether there are any.
fn widen_f16(from: &[[u8; 2]], to: &mut [f32]) {
    let mut block = [f16::ZERO; BLOCK];
    for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(BLOCK)) {
        for (value, bytes) in block.iter_mut().zip(from) {
            *value = f16::from_le_bytes(*bytes);
        }
        block[..from.len()].convert_to_f32_slice(to);
    }
}

fn widen_bf16(from: &[[u8; 2]], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_le_bytes(*from).to_f32();
    }
}
