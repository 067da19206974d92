//! Seeded Gaussian noise, the same as torch's, and resumable.
//!
//! Python twin: `torch.Generator` with `torch.randn`, and `randn_tensor` of diffusers for a list of generators.
//!
//! There are three kinds, see [`NoiseKind`]. One generator draws for all pictures of a batch at once; several draw each
//! for its own picture, which then does not depend on the others.

mod cpu;
mod mersenne;
mod philox;
mod vector;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tensor::Latents;
use cpu::Cpu;

/// The most draws that [`Noise::replay`] skips: beyond any run, and still a second or two.
const MAX_DRAWS: u64 = 1 << 31;

/// Whose noise it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseKind {
    /// torch's on the CPU in f32, bit for bit on x86: diffusers in f32, `ComfyUI`, the web UI's "CPU".
    #[default]
    Cpu,
    /// torch's on the CPU in f16, bit for bit: diffusers in f16 with a CPU generator, on torch 2.15.
    #[serde(rename = "cpu-f16")]
    CpuF16,
    /// torch's on CUDA within 10⁻⁵: the web UI's "GPU" and "NV", diffusers with a CUDA generator.
    Cuda,
}

/// One or several generators of standard normal noise.
///
/// Only the low 32 bits of the seed count on the CPU, as in torch: 5 and 2³² + 5 give the same noise. On CUDA all do.
#[derive(Debug, Clone, PartialEq)]
pub struct Noise {
    /// At least one.
    generators: Vec<Generator>,
}

#[derive(Debug, Clone, PartialEq)]
struct Generator {
    seed: u64,
    source: Source,
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    Cpu(Box<Cpu>),
    CpuF16(Box<Cpu>),
    Cuda { calls: u64 },
}

/// Where one generator of a [`Noise`] stands: enough to go on in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoisePosition {
    /// The seed it started from.
    pub seed: u64,
    /// Whose noise it makes.
    #[serde(default)]
    pub kind: NoiseKind,
    /// Number of 32-bit words drawn since; of tensors on CUDA.
    pub draws: u64,
    /// The bits of a normal value (f64) that is already made and waits for its use.
    #[serde(default)]
    pub spare: Option<u64>,
}

impl Noise {
    /// Starts one generator from a seed, like `torch.Generator().manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        Self::of(NoiseKind::Cpu, &[seed])
    }

    /// Starts a generator from each seed.
    pub fn of(kind: NoiseKind, seeds: &[u64]) -> Self {
        let generators = seeds.iter().map(|seed| Generator::new(kind, *seed));
        Self {
            generators: generators.collect(),
        }
    }

    /// Draws latents of standard normal noise, like diffusers' `randn_tensor(shape, generator=…)`: one tensor from one
    /// generator, or from several one picture each, `[1, channels, h, w]`.
    pub fn normal(&mut self, shape: [usize; 4]) -> Latents {
        let mut latents = Latents::zeros(shape);
        if let Some(values) = latents.as_slice_memory_order_mut() {
            self.fill(values);
        }
        latents
    }

    /// Fills a contiguous tensor with standard normal noise, an equal part from each generator.
    pub fn fill(&mut self, values: &mut [f32]) {
        let part = values.len() / self.generators.len().max(1);
        for (generator, values) in self
            .generators
            .iter_mut()
            .zip(values.chunks_exact_mut(part.max(1)))
        {
            generator.fill(values);
        }
    }

    /// Where each generator stands.
    pub fn positions(&self) -> Vec<NoisePosition> {
        self.generators.iter().map(Generator::position).collect()
    }

    /// Generators that go on from positions.
    ///
    /// # Errors
    /// [`Error::Request`] when no generator can have stood there, or there is none.
    pub fn replay(positions: &[NoisePosition]) -> Result<Self> {
        if positions.is_empty() {
            return Err(Error::request("seed", "no noise position was saved"));
        }
        let generators = positions.iter().map(Generator::replay);
        Ok(Self {
            generators: generators.collect::<Result<_>>()?,
        })
    }
}

impl Generator {
    fn new(kind: NoiseKind, seed: u64) -> Self {
        let source = match kind {
            NoiseKind::Cpu => Source::Cpu(Box::new(Cpu::new(seed, false))),
            NoiseKind::CpuF16 => Source::CpuF16(Box::new(Cpu::new(seed, true))),
            NoiseKind::Cuda => Source::Cuda { calls: 0 },
        };
        Self { seed, source }
    }

    fn fill(&mut self, values: &mut [f32]) {
        match &mut self.source {
            _ if values.is_empty() => {}
            Source::Cpu(cpu) | Source::CpuF16(cpu) => cpu.fill(values),
            Source::Cuda { calls } => {
                philox::fill(self.seed, *calls, values);
                *calls += 1;
            }
        }
    }

    fn position(&self) -> NoisePosition {
        let (kind, draws, spare) = match &self.source {
            Source::Cpu(cpu) => (NoiseKind::Cpu, cpu.engine.draws(), cpu.spare),
            Source::CpuF16(cpu) => (NoiseKind::CpuF16, cpu.engine.draws(), cpu.spare),
            Source::Cuda { calls } => (NoiseKind::Cuda, *calls, None),
        };
        NoisePosition {
            seed: self.seed,
            kind,
            draws,
            spare: spare.map(f64::to_bits),
        }
    }

    fn replay(position: &NoisePosition) -> Result<Self> {
        let spare = position.spare.map(f64::from_bits);
        if position.draws > MAX_DRAWS || spare.is_some_and(|value| !value.is_finite()) {
            let reason = format!(
                "the saved noise position is damaged ({position:?}); draws go up to {MAX_DRAWS}"
            );
            return Err(Error::request("seed", reason));
        }
        let mut generator = Self::new(position.kind, position.seed);
        match &mut generator.source {
            Source::Cpu(cpu) | Source::CpuF16(cpu) => {
                cpu.engine.skip(position.draws);
                cpu.spare = spare;
            }
            Source::Cuda { calls } => *calls = position.draws,
        }
        Ok(generator)
    }
}

impl FromStr for NoiseKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cpu-f16" => Ok(Self::CpuF16),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("`{text}` is not known; known: cpu, cpu-f16, cuda")),
        }
    }
}

impl fmt::Display for NoiseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::CpuF16 => "cpu-f16",
            Self::Cuda => "cuda",
        })
    }
}
