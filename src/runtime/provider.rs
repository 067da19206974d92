//! Registers execution providers, and says why one cannot be had.
//!
//! ONNX Runtime lists providers that it cannot load and falls back to the processor in silence; registration with
//! `error_on_failure` is what tells the truth.

use ort::environment::Environment;
use ort::ep::{self, ExecutionProviderDispatch};
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, SessionBuilder};

use crate::error::{Error, Result};
use crate::plan::names;
use crate::provider::Provider;

/// Names ONNX Runtime's own options of its CUDA provider, `key=value` with commas between, over those that are set here:
/// to compare them, or to get by where hardware or drivers do not do what is expected.
const CUDA_OPTIONS: &str = "TRONIE_CUDA_OPTIONS";
const CAPTURE: &str = "enable_cuda_graph";

/// What to register for a provider, in ONNX Runtime's order of preference. The processor is always there, with an
/// arena for its memory unless told otherwise.
fn dispatch(
    provider: Provider,
    component: &str,
    arena: bool,
) -> Result<Vec<ExecutionProviderDispatch>> {
    Ok(match provider {
        Provider::Cpu if arena => Vec::new(),
        Provider::Cpu => vec![ep::CPU::default().with_arena_allocator(false).build()],
        Provider::Cuda => vec![cuda(component)?.build().error_on_failure()],
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
    })
}

/// The CUDA provider as the `cuda` dialect wants it. Read in ONNX Runtime's source, not yet measured; `benches/gpu` does.
fn cuda(component: &str) -> Result<ep::CUDA> {
    use ep::ArbitrarilyConfigurableExecutionProvider as _;
    use ep::cuda::{AttentionBackend, ConvAlgorithmSearch};
    let attention = AttentionBackend::CUDNN_FLASH_ATTENTION
        | AttentionBackend::FLASH_ATTENTION
        | AttentionBackend::EFFICIENT_ATTENTION
        | AttentionBackend::MATH;
    let mut cuda = ep::CUDA::default()
        // The layout of tensor cores; the dialect's transposes cancel against those that this puts around each Conv.
        .with_prefer_nhwc(true)
        .with_fuse_conv_bias(true)
        // With cuDNN 9 the name is history: the better of two heuristics (mode B), no trial runs.
        .with_conv_algorithm_search(ConvAlgorithmSearch::Exhaustive)
        // Without it convolutions avoid tensor cores altogether, in f16 too. f32 networks, which are VAEs that overflow
        // in f16, round the factors of products to 10 bits, as torch's convolutions do by default.
        .with_tf32(true)
        // Otherwise sums over a row, and of squares, are taken in f16.
        .with_skip_layer_norm_strict_mode(true)
        .with_attention_backend(attention)
        // Doubling takes up to twice what a network needs.
        .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested);
    for (key, value) in cuda_options()? {
        if key != CAPTURE || names::is_unet(component) {
            cuda = cuda.with_arbitrary_config(key, value);
        }
    }
    Ok(cuda)
}

/// What the environment asks of the CUDA provider.
fn cuda_options() -> Result<Vec<(String, String)>> {
    let text = std::env::var(CUDA_OPTIONS).unwrap_or_default();
    let options = text.split(',').filter(|part| !part.is_empty()).map(|part| {
        let (key, value) = part.split_once('=').ok_or_else(|| Error::Provider {
            provider: Provider::Cuda.name(),
            reason: format!("{CUDA_OPTIONS}: `{part}` is not key=value"),
        })?;
        Ok((key.trim().to_owned(), value.trim().to_owned()))
    });
    options.collect()
}

/// Whether runs of a component's bindings become CUDA graphs: only the `UNet` runs often enough with one shape.
pub(super) fn captures(provider: Provider, component: &str) -> Result<bool> {
    if provider != Provider::Cuda || !names::is_unet(component) {
        return Ok(false);
    }
    let asked = cuda_options()?;
    Ok(asked
        .iter()
        .any(|(key, value)| key == CAPTURE && value == "1"))
}

/// A session builder with the provider registered, for a component of a model; `arena` is whether the processor's
/// memory comes from an arena.
pub(super) fn builder(
    environment: &Environment,
    provider: Provider,
    component: &str,
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
    let dispatch = dispatch(provider, component, arena)?;
    if dispatch.is_empty() {
        return Ok(builder);
    }
    builder
        .with_execution_providers(dispatch)
        .map_err(|e| fail(e.to_string()))
}

/// Whether the provider can be registered.
pub(super) fn probe(environment: &Environment, provider: Provider) -> Result<()> {
    builder(environment, provider, "probe", true).map(drop)
}
