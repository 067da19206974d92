//! How ONNX Runtime is told to lay out and run a network: what each memory mode means in its options.
//!
//! What each option costs and gains is measured in `benches/README.md`.

use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use super::{Runtime, provider, runtime_error};
use crate::error::Result;
use crate::graph::Graph;
use crate::memory::MemoryMode;

/// Rank of a convolution's weights `[out, in, height, width]`.
const CONVOLUTION: usize = 4;
/// Bytes of convolution weights that the mode `low` lets ONNX Runtime copy into its blocked layout: room for SDXL's VAE
/// (0.2 GB, a tenth faster for it), not for its UNet (1.3 GB).
const LOW_MEMORY_COPY: u64 = 256 << 20;

/// A session builder for `graph`, the network called `component`.
pub(super) fn builder(
    runtime: &Runtime,
    component: &str,
    graph: &Graph,
    memory: MemoryMode,
) -> Result<SessionBuilder> {
    let fail = |e: &ort::Error<SessionBuilder>| runtime_error(component, e);
    // Without the arena, activations go back to the system as soon as they are used up.
    let arena = memory != MemoryMode::Low;
    let mut builder = provider::builder(runtime.library.environment(), runtime.provider, arena)?
        .with_optimization_level(level(graph, memory))
        .map_err(|e| fail(&e))?
        // Prepacking copies all matrices: 9 GB for SDXL's UNet, and ten times the loading time.
        .with_prepacking(memory == MemoryMode::Fast)
        .map_err(|e| fail(&e))?
        // A pattern is one block as large as all activations together, kept beside the arena: 0.5 GB more for SDXL's
        // decoder at 512x512, and no faster.
        .with_memory_pattern(false)
        .map_err(|e| fail(&e))?;
    if let Some(threads) = runtime.threads {
        builder = builder.with_intra_threads(threads).map_err(|e| fail(&e))?;
    }
    Ok(builder)
}

/// The highest level adds the blocked layout of convolutions, for which their weights are copied.
fn level(graph: &Graph, memory: MemoryMode) -> GraphOptimizationLevel {
    let convolutions = graph
        .weights
        .iter()
        .filter(|w| w.shape.len() == CONVOLUTION)
        .map(crate::graph::Weight::bytes)
        .sum::<u64>();
    if memory == MemoryMode::Low && convolutions > LOW_MEMORY_COPY {
        GraphOptimizationLevel::Level2
    } else {
        GraphOptimizationLevel::All
    }
}
