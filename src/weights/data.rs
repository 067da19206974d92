//! The values of one tensor as f32 or f16: in place where the file allows it, converted where it does not.
//!
//! Python twin: `safe_open(...).get_tensor(name).float()` or `.half()`.

use std::ops::Range;
use std::sync::Arc;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::mapping::Mapping;

/// Values per unit of parallel work: enough to outweigh the scheduling, small enough to stay in the cache.
const CHUNK: usize = 1 << 15;
/// Values per narrow block on the stack.
const BLOCK: usize = 256;
/// The smallest value that becomes infinite in f16: halfway between its largest, 65504, and the next step.
const FIRST_INFINITE: f32 = 65520.0;

/// A tensor's values in the type that a graph computes in, f32 or f16, with their shape. Clones share the values, and
/// keep the file mapped if the values lie in it.
#[derive(Debug, Clone)]
pub struct WeightData<T = f32> {
    shape: Vec<usize>,
    values: Values<T>,
}

#[derive(Debug, Clone)]
enum Values<T> {
    /// Of type `T`, aligned and in this machine's byte order: [`WeightData::read`] makes no other.
    Mapped(Arc<Mapping>, Range<usize>),
    Owned(Arc<Vec<T>>),
}

/// Why a tensor cannot be had in a narrower type.
pub(super) enum Unfit {
    /// Its stored type is not one that is converted.
    Type,
    /// It holds this value, which is beyond the narrower type's largest.
    Overflow(f32),
}

/// A type that weights are used in.
pub trait Element: Copy + Send + Sync + 'static {
    /// The values, if the bytes are aligned for them. Every pattern of bits is a value.
    fn cast(bytes: &[u8]) -> Option<&[Self]>;

    /// Zeros in memory that nothing has touched, so that the threads that fill it get its pages.
    fn zeros(count: usize) -> Vec<Self>;
}

impl Element for f32 {
    fn cast(bytes: &[u8]) -> Option<&[Self]> {
        bytemuck::try_cast_slice(bytes).ok()
    }

    fn zeros(count: usize) -> Vec<Self> {
        vec![0.0; count]
    }
}

impl Element for f16 {
    fn cast(bytes: &[u8]) -> Option<&[Self]> {
        let bits = bytemuck::try_cast_slice::<u8, u16>(bytes).ok()?;
        Some(bits.reinterpret_cast())
    }

    fn zeros(count: usize) -> Vec<Self> {
        vec![0_u16; count].reinterpret_into()
    }
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
            Dtype::F32 if in_place::<f32>(bytes) => Values::Mapped(Arc::clone(map), range),
            Dtype::F32 => Values::Owned(owned(bytes, bytes.len() / 4, |from, to| {
                convert(from, to, copy_f32);
            })),
            _ => Values::Owned(owned(bytes, bytes.len() / 2, widener(dtype)?)),
        };
        Some(Self { shape, values })
    }

    /// The same values in f16, rounded to nearest.
    fn narrowed(&self) -> Result<WeightData<f16>, Unfit> {
        let mut narrowed = f16::zeros(self.as_slice().len());
        narrow(self.as_slice(), &mut narrowed)?;
        Ok(WeightData::owned(self.shape.clone(), narrowed))
    }
}

impl WeightData<f16> {
    /// The values at `range` of a file: where they lie if they are f16, else rounded to f16.
    pub(super) fn read_half(
        map: &Arc<Mapping>,
        range: Range<usize>,
        dtype: Dtype,
        shape: Vec<usize>,
    ) -> Result<Self, Unfit> {
        let bytes = &map.bytes()[range.clone()];
        if dtype == Dtype::F16 {
            let values = if in_place::<f16>(bytes) {
                Values::Mapped(Arc::clone(map), range)
            } else {
                let (narrow, _) = bytes.as_chunks::<2>();
                let values = narrow.iter().map(|bytes| f16::from_le_bytes(*bytes));
                Values::Owned(Arc::new(values.collect()))
            };
            return Ok(Self { shape, values });
        }
        let wide = WeightData::read(map, range, dtype, shape).ok_or(Unfit::Type)?;
        wide.narrowed()
    }
}

impl<T: Element> WeightData<T> {
    /// Values that lie in no file. The caller has checked that there are as many as `shape` says.
    pub(super) fn owned(shape: Vec<usize>, values: Vec<T>) -> Self {
        Self {
            shape,
            values: Values::Owned(Arc::new(values)),
        }
    }

    /// A matrix whose values are stored column by column, row by row.
    pub(super) fn transposed(self) -> Self {
        let [rows, columns] = self.shape[..] else {
            return self;
        };
        let stored = self.as_slice();
        let row = |row: usize| (0..columns).map(move |column| stored[column * rows + row]);
        let values = (0..rows).flat_map(row).collect();
        Self::owned(self.shape, values)
    }

    /// The dimensions; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values in row-major order.
    pub fn as_slice(&self) -> &[T] {
        match &self.values {
            // `read` and `read_half` map aligned values only.
            Values::Mapped(map, range) => T::cast(&map.bytes()[range.clone()]).unwrap_or(&[]),
            Values::Owned(values) => values,
        }
    }

    /// Where the values begin. The address stays valid and the same for as long as this value or a clone of it lives.
    pub fn as_ptr(&self) -> *const T {
        self.as_slice().as_ptr()
    }

    /// The values, copied only where they lie in the file or are shared.
    pub(crate) fn into_vec(self) -> Vec<T> {
        match self.values {
            Values::Owned(values) => Arc::unwrap_or_clone(values),
            Values::Mapped(..) => self.as_slice().to_vec(),
        }
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

/// What fills f32 values from their bytes in a file, exactly; `None` for a type that is not read as f32.
pub(super) fn filler(dtype: Dtype) -> Option<Widen> {
    match dtype {
        Dtype::F32 => Some(|from, to| convert(from, to, copy_f32)),
        other => widener(other),
    }
}

fn owned(bytes: &[u8], count: usize, widen: Widen) -> Arc<Vec<f32>> {
    let mut values = vec![0.0; count];
    widen(bytes, &mut values);
    Arc::new(values)
}

/// Whether a file's bytes can be used as they are.
fn in_place<T: Element>(bytes: &[u8]) -> bool {
    cfg!(target_endian = "little") && T::cast(bytes).is_some()
}

/// Rounds to f16, in parallel; refuses finite values that would become infinite.
pub(super) fn narrow(wide: &[f32], narrow: &mut [f16]) -> Result<(), Unfit> {
    let is_lost = |value: &f32| (value.abs() >= FIRST_INFINITE) & value.is_finite();
    let overflow = narrow
        .par_chunks_mut(CHUNK)
        .zip(wide.par_chunks(CHUNK))
        .find_map_any(|(to, from)| {
            to.convert_from_f32_slice(from);
            // Without a branch, as vector instructions want it; the search comes only where there is something to find.
            let any = from.iter().fold(false, |any, value| any | is_lost(value));
            any.then(|| from.iter().copied().find(|value| is_lost(value)))?
        });
    overflow.map_or(Ok(()), |value| Err(Unfit::Overflow(value)))
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
