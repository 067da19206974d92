//! How ONNX Runtime is told to lay out and run a network: what each memory mode means in its options.
//!
//! What each option costs and gains is measured in `benches/README.md`.

use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use super::{Runtime, provider, runtime_error};
use crate::error::Result;
use crate::graph::Graph;
use crate::memory::MemoryMode;
use crate::provider::Provider;

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
    let environment = runtime.library.environment();
    // CUDA's convolutions prepack on the device, instead of their weights and not beside them; without, they take them
    // for what they are not.
    let prepacking = memory == MemoryMode::Fast || runtime.provider == Provider::Cuda;
    let mut builder = provider::builder(environment, runtime.provider, component, arena)?
        .with_optimization_level(level(graph, memory, runtime.provider))
        .map_err(|e| fail(&e))?
        // Prepacking copies all matrices: 9 GB for SDXL's UNet, and ten times the loading time.
        .with_prepacking(prepacking)
        .map_err(|e| fail(&e))?
        // A pattern is one block as large as all activations together, kept beside the arena: 0.5 GB more for SDXL's
        // decoder at 512x512, and no faster. On CUDA it is what keeps the device's memory in one piece.
        .with_memory_pattern(runtime.provider == Provider::Cuda)
        .map_err(|e| fail(&e))?;
    if let Some(threads) = runtime.threads {
        builder = builder.with_intra_threads(threads).map_err(|e| fail(&e))?;
    }
    if let Some(folder) = &runtime.profiles {
        builder = builder
            .with_profiling(folder.next(component))
            .map_err(|e| fail(&e))?;
    }
    Ok(builder)
}

/// The highest level adds the processor's blocked layout of convolutions, for which their weights are copied.
fn level(graph: &Graph, memory: MemoryMode, provider: Provider) -> GraphOptimizationLevel {
    let convolutions = graph
        .weights
        .iter()
        .filter(|w| w.shape.len() == CONVOLUTION)
        .map(crate::graph::Weight::bytes)
        .sum::<u64>();
    let copies = provider == Provider::Cpu && convolutions > LOW_MEMORY_COPY;
    if copies && memory == MemoryMode::Low {
        GraphOptimizationLevel::Level2
    } else {
        GraphOptimizationLevel::All
    }
}
