//! Noise as torch draws it on an x86 CPU, in f32 and in f16.
//!
//! torch draws from a Mersenne Twister and transforms pairs of uniforms (Box & Muller 1958) in one of two ways: sixteen
//! values at a time for tensors of 16 values and more, one at a time in f64 for smaller ones. Both are reproduced, down
//! to the second value of a pair that waits for the next small tensor. In f16 the values of f32 are rounded; so does torch
//! 2.15, while torch 2.6 drew another sequence there, which this does not have. On ARM, torch uses the platform's
//! logarithm and sine, and agrees with this to 3 units in the last place.

use half::f16;
use rayon::prelude::*;

use super::mersenne::MersenneTwister;
use super::vector;

/// Tensors of at least this many values are drawn in blocks of this many.
const BLOCK: usize = 16;
/// Fewer blocks than this are not worth another thread.
const PARALLEL_BLOCKS: usize = 512;

/// A generator.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cpu {
    pub engine: MersenneTwister,
    /// The second value of the latest scalar pair, until a small tensor takes it.
    pub spare: Option<f64>,
    /// Whether values are rounded to f16.
    half: bool,
}

impl Cpu {
    pub(super) fn new(seed: u64, half: bool) -> Self {
        Self {
            engine: MersenneTwister::new(seed as u32),
            spare: None,
            half,
        }
    }

    /// Fills a contiguous tensor with standard normal noise.
    pub(super) fn fill(&mut self, values: &mut [f32]) {
        if values.len() < BLOCK {
            for value in values {
                let normal = self.scalar() as f32;
                *value = if self.half { narrow(normal) } else { normal };
            }
            return;
        }
        let half = self.half;
        // In f32 a tail that is no whole block is drawn here too, though it is drawn again.
        let drawn = if half {
            values.len() / BLOCK * BLOCK
        } else {
            values.len()
        };
        self.uniform(&mut values[..drawn]);
        let blocks = values.as_chunks_mut::<BLOCK>().0;
        // The words are drawn one after the other, but blocks are transformed independently of each other.
        blocks
            .par_chunks_mut(PARALLEL_BLOCKS)
            .for_each(|blocks| transform(blocks, half));
        // A tail that is no whole block is redrawn together with the values before it.
        if !values.len().is_multiple_of(BLOCK)
            && let Some(tail) = values.last_chunk_mut::<BLOCK>()
        {
            self.uniform(tail);
            transform(std::slice::from_mut(tail), half);
        }
    }

    /// Uniform values in [0, 1), 24 bits each.
    fn uniform(&mut self, values: &mut [f32]) {
        const UNIT: f32 = 1.0 / 16_777_216.0;
        self.engine
            .fill(values, |word| (word & 0x00ff_ffff) as f32 * UNIT);
    }

    /// A uniform value in [0, 1), 53 bits, the first word drawn being the high one.
    fn uniform_f64(&mut self) -> f64 {
        const UNIT: f64 = 1.0 / 9_007_199_254_740_992.0;
        let high = u64::from(self.engine.next());
        let word = (high << 32) | u64::from(self.engine.next());
        (word & ((1 << 53) - 1)) as f64 * UNIT
    }

    /// One normal value: a waiting one, or the first of a new pair.
    fn scalar(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (turn, u) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u).ln_1p()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * turn;
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

fn transform(blocks: &mut [[f32; BLOCK]], half: bool) {
    vector::box_muller(blocks);
    if half {
        for value in blocks.iter_mut().flatten() {
            *value = narrow(*value);
        }
    }
}

fn narrow(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}
