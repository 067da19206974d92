//! Tensors with their changes: the stored values are widened into a piece of memory, and changed where they lie there.
//!
//! They are read from the checkpoint itself, not from its expansion, which is as exact and twice as long.
//!
//! Python twin: `merge` of PEFT's layers, which changes `weight.data` in place.

use half::f16;

use super::data::{Element, WeightData, filler, narrow};
use super::{Fault, Stored, Weights};
use crate::error::Result;

impl Weights {
    /// A tensor's values with its changes, as [`Weights::tensor_f32`] gives them, in `room`, which grows if it has to: the
    /// same memory serves tensor after tensor.
    ///
    /// # Errors
    /// As [`Weights::tensor_f32`].
    pub(crate) fn fill_f32<'r>(
        &self,
        name: &str,
        expected: &[usize],
        room: &'r mut Vec<f32>,
    ) -> Result<&'r [f32]> {
        let stored = self
            .fitting(name, expected)
            .map_err(|fault| self.error(name, expected, &fault))?;
        let values = grown(room, stored.shape.iter().product());
        self.read_into(name, stored, values)?;
        for change in self.changes.get(name).into_iter().flatten() {
            change.apply(values, &stored.shape)?;
        }
        Ok(values)
    }

    /// The same rounded to f16, as [`Weights::tensor_f16`] gives them; `wide` is memory for the values before that.
    ///
    /// # Errors
    /// As [`Weights::tensor_f16`].
    pub(crate) fn fill_f16<'r>(
        &self,
        name: &str,
        expected: &[usize],
        wide: &mut Vec<f32>,
        room: &'r mut Vec<f16>,
    ) -> Result<&'r [f16]> {
        let wide = self.fill_f32(name, expected, wide)?;
        let values = grown(room, wide.len());
        match (narrow(wide, values), self.tensors.get(name)) {
            (Err(unfit), Some(stored)) => Err(self.unfit(name, stored, &unfit)),
            _ => Ok(values),
        }
    }

    /// Reads a tensor without its changes.
    fn read_into(&self, name: &str, stored: &Stored, to: &mut [f32]) -> Result<()> {
        let (map, stored) = self.source(name, stored);
        let fault = || self.error(name, &stored.shape, &Fault::Type(stored.dtype));
        if stored.is_transposed {
            let (range, shape) = (stored.range.clone(), stored.shape.clone());
            let data = WeightData::read(map, range, stored.dtype, shape).ok_or_else(fault)?;
            to.copy_from_slice(stored.seen(data).as_slice());
            return Ok(());
        }
        let fill = filler(stored.dtype).ok_or_else(fault)?;
        fill(&map.bytes()[stored.range.clone()], to);
        Ok(())
    }
}

/// The first `count` values of `room`.
fn grown<T: Element>(room: &mut Vec<T>, count: usize) -> &mut [T] {
    if room.len() < count {
        // First, so that both are never held at once.
        *room = Vec::new();
        *room = T::zeros(count);
    }
    &mut room[..count]
}
