//! Seeded Gaussian noise, equal bit for bit to `torch.randn` on an x86 CPU in f32, and resumable.
//!
//! Python twin: `torch.Generator("cpu")` with `torch.randn`.
//!
//! torch draws from a Mersenne Twister and transforms pairs of uniforms (Box & Muller 1958) in one of two ways: sixteen
//! values at a time with polynomial f32 logarithm, sine and cosine for tensors of 16 values and more, one at a time in f64
//! for smaller ones. Both are reproduced, down to the second value of a pair that waits for the next small tensor. On
//! ARM, torch uses the platform's logarithm and sine instead, and agrees with this to 3 units in the last place.

mod mersenne;
mod vector;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tensor::Latents;
use mersenne::MersenneTwister;

/// Tensors of at least this many values are drawn in blocks of this many.
const BLOCK: usize = 16;

/// Fewer blocks than this are not worth another thread.
const PARALLEL_BLOCKS: usize = 512;

/// The most draws that [`Noise::replay`] skips: beyond any run, and still a second or two.
const MAX_DRAWS: u64 = 1 << 31;

/// A generator of standard normal noise.
///
/// Only the low 32 bits of the seed count, as in torch: 5 and 2³² + 5 give the same noise.
#[derive(Debug, Clone, PartialEq)]
pub struct Noise {
    seed: u64,
    engine: MersenneTwister,
    /// The second value of the latest scalar pair, until a small tensor takes it.
    spare: Option<f64>,
}

/// Where a [`Noise`] stands: enough to go on in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoisePosition {
    /// The seed it started from.
    pub seed: u64,
    /// Number of 32-bit words drawn since.
    pub draws: u64,
    /// The bits of a normal value (f64) that is already made and waits for its use.
    #[serde(default)]
    pub spare: Option<u64>,
}

impl Noise {
    /// Starts from a seed, like `torch.Generator().manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            engine: MersenneTwister::new(seed as u32),
            spare: None,
        }
    }

    /// Draws latents of standard normal noise, like `torch.randn(shape, generator=…)`.
    pub fn normal(&mut self, shape: [usize; 4]) -> Latents {
        let mut values = vec![0.0; shape.iter().product()].into_iter();
        self.fill(values.as_mut_slice());
        Latents::from_shape_simple_fn(shape, || values.next().unwrap_or_default())
    }

    /// Fills a contiguous tensor with standard normal noise.
    pub fn fill(&mut self, values: &mut [f32]) {
        if values.len() < BLOCK {
            for value in values {
                *value = self.scalar() as f32;
            }
            return;
        }
        self.uniform(values);
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        // The words are drawn one after the other, but blocks are transformed independently of each other.
        blocks
            .par_iter_mut()
            .with_min_len(PARALLEL_BLOCKS)
            .for_each(vector::box_muller);
        // A tail that is no whole block is redrawn together with the values before it.
        if !rest.is_empty()
            && let Some(tail) = values.last_chunk_mut::<BLOCK>()
        {
            self.uniform(tail);
            vector::box_muller(tail);
        }
    }

    /// Where the generator stands.
    pub fn position(&self) -> NoisePosition {
        NoisePosition {
            seed: self.seed,
            draws: self.engine.draws(),
            spare: self.spare.map(f64::to_bits),
        }
    }

    /// A generator that goes on from a position.
    ///
    /// # Errors
    /// [`Error::Request`] when no generator can have stood there.
    pub fn replay(position: NoisePosition) -> Result<Self> {
        let spare = position.spare.map(f64::from_bits);
        if position.draws > MAX_DRAWS || spare.is_some_and(|value| !value.is_finite()) {
            let reason = format!(
                "the saved noise position is damaged ({position:?}); draws go up to {MAX_DRAWS}"
            );
            return Err(Error::request("seed", reason));
        }
        let mut noise = Self::new(position.seed);
        noise.engine.skip(position.draws);
        noise.spare = spare;
        Ok(noise)
    }

    /// Uniform values in [0, 1), 24 bits each.
    fn uniform(&mut self, values: &mut [f32]) {
        const UNIT: f32 = 1.0 / 16_777_216.0;
        for value in values {
            *value = (self.engine.next() & 0x00ff_ffff) as f32 * UNIT;
        }
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
