//! How a change of one tensor is computed: in blocks of rows, in parallel, in place.
//!
//! Only the factors take memory beside the tensor, and where a block has to be kept (LoHa, DoRA), the block.
//!
//! Python twin: `merge` of PEFT's and `get_merged_weight` of LyCORIS's modules. Paper of DoRA: arXiv:2402.09353.

use ndarray::{Array1, ArrayView2, ArrayViewMut2, ShapeError};
use rayon::prelude::*;

use super::factors::{Factors, Loaded, Tensor};
use crate::error::{Error, Result, quoted};
use crate::weights::Weights;

/// Values of a block: a few megabytes, so that blocks stay in the cache, and those that are kept are small.
const BLOCK: usize = 1 << 20;
/// Rows of a block at least: the product packs the columns' factor anew for each, which outweighs fewer rows.
const LEAST_ROWS: usize = 256;
/// A multiple of the rows of a tile of the matrix product.
const TILES: usize = 64;
/// Values that are looked through at a time.
const LOOK: usize = 1 << 15;

/// What is done to one tensor.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) factors: Factors,
    /// What the factors' product is multiplied by: alpha / rank.
    pub(super) scale: f64,
    pub(super) magnitude: Option<Magnitude>,
}

/// The magnitudes of a DoRA: the norms that rows or columns of the changed weight have.
#[derive(Debug)]
pub(super) struct Magnitude {
    pub(super) tensor: Tensor,
    pub(super) axis: Axis,
}

/// Along what a DoRA keeps norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// One norm an output: PEFT's way, and LyCORIS's by default.
    Output,
    /// One norm an input, over all outputs and the kernel: older files of LyCORIS.
    Input,
}

impl Update {
    /// Changes a tensor in place, by `strength` times what training meant it to be changed.
    pub(super) fn apply(
        &self,
        file: &Weights,
        strength: f64,
        values: &mut [f32],
        shape: &[usize],
    ) -> Result<()> {
        if strength == 0.0 {
            return Ok(());
        }
        let fault = |reason: String| Error::Weights {
            path: file.paths().next().map(Into::into).unwrap_or_default(),
            reason,
        };
        let extent = self.factors.extent().map_err(&fault)?;
        let count = extent.rows.checked_mul(extent.columns);
        if count != Some(values.len())
            || shape.first().unwrap_or(&1) * extent.columns != values.len()
        {
            return Err(fault(format!(
                "changes {} rows of {} values, and is applied to a tensor of shape {shape:?}",
                extent.rows, extent.columns
            )));
        }
        if values.is_empty() {
            return Ok(());
        }
        let loaded = self.factors.read(file)?;
        let merge = Merge {
            loaded: &loaded,
            scale: self.scale,
            columns: extent.columns,
        };
        let done = match &self.magnitude {
            None => merge.plain(strength, values),
            Some(magnitude) => {
                let tensor = &magnitude.tensor;
                let target = file.tensor_f32(&tensor.name, &tensor.shape)?;
                let target = target.as_slice();
                match magnitude.axis {
                    Axis::Output => merge.by_output(strength, target, values),
                    Axis::Input => merge.by_input(strength, target, values),
                }
            }
        };
        done.map_err(|e| fault(format!("cannot be merged: {e}")))?;
        match not_finite(values) {
            None => Ok(()),
            Some(value) => Err(fault(format!(
                "{} makes a weight {value} at scale {strength}: use a smaller scale, or fetch the file again",
                quoted(self.factors.name())
            ))),
        }
    }
}

struct Merge<'a> {
    loaded: &'a Loaded,
    scale: f64,
    columns: usize,
}

impl Merge<'_> {
    /// Rows of a block: few enough for every thread to get one, and so many that the product's own tiles are whole, whose
    /// rest is rounded otherwise: how many threads there are makes no difference.
    fn rows(&self, values: &[f32]) -> usize {
        let share = (values.len() / self.columns).div_ceil(rayon::current_num_threads());
        let rows = (BLOCK / self.columns).max(LEAST_ROWS).min(share);
        rows.next_multiple_of(TILES)
    }

    /// `W + strength · scale · Δ`.
    fn plain(&self, strength: f64, values: &mut [f32]) -> Result<(), ShapeError> {
        let factor = (strength * self.scale) as f32;
        self.blocks(values, |first, mut block| {
            self.loaded.add(factor, first, &mut block);
        })
    }

    /// Calls with the first row and the block, for all blocks in parallel.
    fn blocks(
        &self,
        values: &mut [f32],
        each: impl Fn(usize, ArrayViewMut2<'_, f32>) + Sync,
    ) -> Result<(), ShapeError> {
        let (rows, columns) = (self.rows(values), self.columns);
        let chunks = values.par_chunks_mut(rows * columns).enumerate();
        chunks.try_for_each(|(at, chunk)| {
            let block = ArrayViewMut2::from_shape((chunk.len() / columns, columns), chunk)?;
            each(at * rows, block);
            Ok(())
        })
    }

    /// Rows with norms of their own: `W' = m V / ‖V‖` row by row, where `V = W + scale · Δ`.
    fn by_output(
        &self,
        strength: f64,
        norms: &[f32],
        values: &mut [f32],
    ) -> Result<(), ShapeError> {
        self.blocks(values, |first, mut block| {
            let mut changed = block.to_owned();
            self.loaded
                .add(self.scale as f32, first, &mut changed.view_mut());
            let rows = block.rows_mut().into_iter().zip(changed.rows());
            for ((mut to, from), &norm) in rows.zip(&norms[first..]) {
                let square: f64 = from.iter().map(|&v| f64::from(v).powi(2)).sum();
                let factor = strength * ratio(norm, square);
                to.zip_mut_with(&from, |to, v| *to = blend(strength, *to, factor, *v));
            }
        })
    }

    /// Columns with norms of their own, each over all rows and the kernel's places.
    fn by_input(&self, strength: f64, norms: &[f32], values: &mut [f32]) -> Result<(), ShapeError> {
        let (rows, columns) = (self.rows(values), self.columns);
        let changed = |first: usize, block: ArrayView2<'_, f32>| {
            let mut changed = block.to_owned();
            self.loaded
                .add(self.scale as f32, first, &mut changed.view_mut());
            changed
        };
        let squares = values
            .par_chunks(rows * columns)
            .enumerate()
            .map(|(at, chunk)| {
                let block = ArrayView2::from_shape((chunk.len() / columns, columns), chunk)?;
                let mut squares = Array1::<f64>::zeros(columns);
                for row in changed(at * rows, block).rows() {
                    squares.zip_mut_with(&row, |sum, &v| *sum += f64::from(v).powi(2));
                }
                Ok(squares)
            })
            .try_reduce(|| Array1::zeros(columns), |a, b| Ok(a + b))?;
        // The kernel's places of one input lie side by side.
        let area = columns / norms.len();
        let factors: Vec<f64> = (squares.as_slice().unwrap_or_default())
            .chunks_exact(area)
            .zip(norms)
            .flat_map(|(squares, &norm)| {
                let factor = strength * ratio(norm, squares.iter().sum());
                std::iter::repeat_n(factor, area)
            })
            .collect();
        self.blocks(values, |first, mut block| {
            let changed = changed(first, block.view());
            for (mut to, from) in block.rows_mut().into_iter().zip(changed.rows()) {
                for ((to, v), factor) in to.iter_mut().zip(from).zip(&factors) {
                    *to = blend(strength, *to, *factor, *v);
                }
            }
        })
    }
}

/// A value that is not finite, if there is one. All of a piece is looked at, because vector instructions do that faster
/// than they would stop at the first.
fn not_finite(values: &[f32]) -> Option<f32> {
    let pieces = values.par_chunks(LOOK);
    let piece = pieces.find_any(|piece| !piece.iter().fold(true, |all, v| all & v.is_finite()))?;
    piece.iter().copied().find(|value| !value.is_finite())
}

/// The wanted norm over the norm that is; what is zero stays zero.
fn ratio(norm: f32, square: f64) -> f64 {
    if square == 0.0 {
        0.0
    } else {
        f64::from(norm) / square.sqrt()
    }
}

/// `W + strength (W' − W)`, with the strength in `factor` already.
fn blend(strength: f64, base: f32, factor: f64, changed: f32) -> f32 {
    ((1.0 - strength) * f64::from(base) + factor * f64::from(changed)) as f32
}
