//! Registers execution providers, and says why one cannot be had.
//!
//! ONNX Runtime lists providers that it cannot load and falls back to the processor in silence; registration with
//! `error_on_failure` is what tells the truth.

use ort::environment::Environment;
use ort::ep::{self, ExecutionProviderDispatch};
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};

use crate::error::{Error, Result};
use crate::provider::Provider;

/// What to register for a provider, in ONNX Runtime's order of preference. The processor is always there, with an
/// arena for its memory unless told otherwise.
fn dispatch(provider: Provider, arena: bool) -> Vec<ExecutionProviderDispatch> {
    match provider {
        Provider::Cpu if arena => Vec::new(),
        Provider::Cpu => vec![ep::CPU::default().with_arena_allocator(false).build()],
        Provider::Cuda => vec![ep::CUDA::default().build().error_on_failure()],
        // TensorRT leaves the nodes it cannot take to CUDA; the graph's weights are over protobuf's 2 GB.
        Provider::Trt => {
            use ep::ArbitrarilyConfigurableExecutionProvider as _;
            let trt =
                ep::TensorRT::default().with_arbitrary_config("trt_load_user_initializer", "1");
            vec![
                trt.build().error_on_failure(),
                ep::CUDA::default().build().error_on_failure(),
            ]
        }
        // The older format has no normalisation operators and its weights are limited to 2 GB.
        Provider::Coreml => {
            let coreml =
                ep::CoreML::default().with_model_format(ep::coreml::ModelFormat::MLProgram);
            vec![coreml.build().error_on_failure()]
        }
    }
}

/// A session builder with the provider registered; `arena` is whether the processor's memory comes from an arena.
pub(super) fn builder(
    environment: &Environment,
    provider: Provider,
    arena: bool,
) -> Result<SessionBuilder> {
    let fail = |reason: String| Error::Provider {
        provider: provider.name(),
        reason,
    };
    let builder = Session::builder(environment).map_err(|e| fail(e.to_string()))?;
    // `ort` asks ONNX Runtime to choose devices by itself, which on macOS adds CoreML to every session.
    let builder = builder
        .with_auto_device(AutoDevicePolicy::PreferCPU)
        .map_err(|e| fail(e.to_string()))?;
    let dispatch = dispatch(provider, arena);
    if dispatch.is_empty() {
        return Ok(builder);
    }
    builder
        .with_execution_providers(dispatch)
        .map_err(|e| fail(e.to_string()))
}

/// Whether the provider can be registered.
pub(super) fn probe(environment: &Environment, provider: Provider) -> Result<()> {
    builder(environment, provider, true).map(drop)
}
