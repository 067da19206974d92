//! One network, ready to run: inputs bound by name and checked, outputs copied out, stopped by the cancel switch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ort::session::{NoSelectedOutputs, RunOptions};

use super::binding::Binding;
use super::{Runtime, model, options, provider, runtime_error, value};
use crate::error::{Error, Result};
use crate::graph::{Dim, Graph, Port, PortType};
use crate::memory::MemoryMode;
use crate::progress::{Cancel, Interrupt};
use crate::provider::Provider;
use crate::tensor::{Tensor, TensorMap};
use crate::weights::Weights;

/// The run option that says under which number ONNX Runtime keeps a run's CUDA graph, and the value for "without".
const GRAPH_ID: &str = "gpu_graph_id";
const NO_GRAPH: &str = "-1";

/// An input by name.
pub type Feed<'a> = (&'a str, &'a Tensor);

/// What stops a run inside a network: ONNX Runtime looks at it between operators.
pub(super) struct Running(RunOptions<NoSelectedOutputs>);

impl Interrupt for Running {
    fn interrupt(&self) {
        // A run that cannot be told to stop ends at the next step, where the switch is looked at.
        let _ = self.0.terminate();
    }
}

/// Time that networks have spent inside ONNX Runtime, in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Busy(AtomicU64);

impl Busy {
    pub(super) fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn add(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// A network on a provider.
pub struct Session {
    // Declared before the weights it reads, so that it is dropped before them.
    pub(super) inner: ort::session::Session,
    component: String,
    pub(super) provider: Provider,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    options: Arc<Running>,
    /// How many bindings have a CUDA graph of their own; `None` where runs are not captured.
    graphs: Option<u32>,
    cancel: Cancel,
    busy: Arc<Busy>,
    _weights: Vec<model::Held>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("component", &self.component)
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(super) fn build(
        runtime: &Runtime,
        component: &str,
        graph: &Graph,
        weights: &Weights,
        memory: MemoryMode,
    ) -> Result<Self> {
        let data = graph
            .weights
            .iter()
            .map(|w| model::Held::read(weights, w))
            .collect::<Result<Vec<_>>>()?;
        let fail = |e: ort::Error| runtime_error(component, &e);
        let model = model::build(graph, &data).map_err(fail)?;
        let builder = options::builder(runtime, component, graph, memory)?;
        let inner = model.into_session(&builder).map_err(fail)?;
        let captures = provider::captures(runtime.provider, component)?;
        let options = run_options(&runtime.cancel, captures.then_some(NO_GRAPH)).map_err(fail)?;
        Ok(Self {
            inner,
            component: component.to_owned(),
            provider: runtime.provider,
            inputs: graph.inputs.clone(),
            outputs: graph.outputs.clone(),
            options,
            graphs: captures.then_some(0),
            cancel: runtime.cancel.clone(),
            busy: Arc::clone(&runtime.busy),
            _weights: data,
        })
    }

    /// Runs the network. `feeds` are exactly its inputs.
    ///
    /// # Errors
    /// [`Error::Contract`] when names, types or dimensions are not the graph's; [`Error::Cancelled`] (step 0) when the
    /// switch was thrown; [`Error::Runtime`] otherwise.
    pub fn run(&mut self, feeds: &[Feed<'_>]) -> Result<TensorMap> {
        self.check(feeds)?;
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled { step: 0 });
        }
        let inputs = feeds
            .iter()
            .map(|(name, tensor)| {
                let port = self.inputs.iter().find(|port| port.name == *name);
                let element = port.map_or(PortType::F32, |port| port.element);
                let value = value::feed(name, tensor, element).map_err(|e| self.failed(&e))?;
                value.ok_or_else(|| self.too_large(name))
            })
            .collect::<Result<Vec<_>>>()?;
        let (component, cancel) = (&self.component, &self.cancel);
        let started = Instant::now();
        let outputs = self.inner.run_with_options(inputs, &self.options.0);
        self.busy.add(started.elapsed());
        let outputs = outputs.map_err(|e| stopped(component, cancel, &e))?;
        let mut result = TensorMap::new();
        for (name, value) in &outputs {
            let tensor = value::read(&value).map_err(|e| runtime_error(component, &e))?;
            result.insert(name.to_owned(), tensor);
        }
        Ok(result)
    }

    /// Runs what is bound, from and to its buffers.
    pub(super) fn run_binding(&mut self, binding: &Binding) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled { step: 0 });
        }
        let (component, cancel) = (&self.component, &self.cancel);
        let started = Instant::now();
        let run = self
            .inner
            .run_binding_with_options(&binding.inner, &binding.options.0)
            .map(drop);
        self.busy.add(started.elapsed());
        run.map_err(|e| stopped(component, cancel, &e))
    }

    /// Whether runs of bindings become CUDA graphs.
    pub(super) fn captures(&self) -> bool {
        self.graphs.is_some()
    }

    /// Options for a binding's runs, under a CUDA graph of its own where runs are captured.
    pub(super) fn new_options(&mut self) -> ort::Result<Arc<Running>> {
        let graph = self.graphs.as_mut().map(|count| {
            *count += 1;
            count.to_string()
        });
        run_options(&self.cancel, graph.as_deref())
    }

    /// Runs the network and gives its f32 output called `wanted`.
    ///
    /// # Errors
    /// As [`Session::run`], and [`Error::Contract`] when there is no such output.
    pub fn run_for(&mut self, feeds: &[Feed<'_>], wanted: &str) -> Result<ndarray::ArrayD<f32>> {
        let outputs = self.run(feeds)?;
        self.pick(outputs, wanted)
    }

    /// The f32 output called `wanted`.
    pub(super) fn pick(
        &self,
        mut outputs: TensorMap,
        wanted: &str,
    ) -> Result<ndarray::ArrayD<f32>> {
        match outputs.remove(wanted) {
            Some(Tensor::F32(array)) => Ok(array),
            Some(Tensor::I64(_)) => Err(self.mismatch(wanted, "an f32 output", "an i64 output")),
            None => Err(self.mismatch(wanted, "such an output", "none in the graph")),
        }
    }

    pub(super) fn check(&self, feeds: &[Feed<'_>]) -> Result<()> {
        for port in &self.inputs {
            let Some((_, tensor)) = feeds.iter().find(|(name, _)| *name == port.name) else {
                return Err(self.mismatch(
                    &port.name,
                    "this pipeline to feed it",
                    "that it does not",
                ));
            };
            let same_type = matches!(
                (port.element, tensor),
                (PortType::F32 | PortType::F16, Tensor::F32(_)) | (PortType::I64, Tensor::I64(_))
            );
            let shape = tensor.shape();
            let same_dims = port.dims.len() == shape.len()
                && port
                    .dims
                    .iter()
                    .zip(shape)
                    .all(|(dim, n)| !matches!(dim, Dim::Fixed(d) if d != n));
            if !same_type || !same_dims {
                return Err(self.mismatch(
                    &port.name,
                    &describe(port),
                    &format!("{shape:?} from the pipeline"),
                ));
            }
        }
        match feeds
            .iter()
            .find(|(name, _)| self.inputs.iter().all(|p| p.name != *name))
        {
            Some((name, _)) => Err(self.mismatch(name, "such an input", "none in the graph")),
            None => Ok(()),
        }
    }

    /// An error of ONNX Runtime in this network.
    pub(super) fn failed(&self, error: &ort::Error) -> Error {
        runtime_error(&self.component, error)
    }

    /// A value for an input that computes in f16 and cannot hold it.
    pub(super) fn too_large(&self, tensor: &str) -> Error {
        let actual = "a larger one: run the model on another provider, such as cpu";
        self.mismatch(tensor, "numbers up to 65504, the largest of f16", actual)
    }

    pub(super) fn mismatch(&self, tensor: &str, expected: &str, actual: &str) -> Error {
        Error::Contract {
            graph: self.component.clone(),
            tensor: tensor.to_owned(),
            expected: expected.to_owned(),
            actual: actual.to_owned(),
        }
    }
}

/// An input's type and dimensions, for messages.
fn describe(port: &Port) -> String {
    let element = match port.element {
        // f16 is between the networks; the pipeline hands over f32.
        PortType::F32 | PortType::F16 => "f32",
        PortType::I64 => "i64",
    };
    let dims = port.dims.iter().map(|dim| match dim {
        Dim::Fixed(size) => size.to_string(),
        Dim::Named(name) => name.clone(),
    });
    format!("{element} [{}]", dims.collect::<Vec<_>>().join(", "))
}

/// Run options that the cancel switch can reach.
fn run_options(cancel: &Cancel, graph: Option<&str>) -> ort::Result<Arc<Running>> {
    let mut options = RunOptions::new()?;
    if let Some(graph) = graph {
        options.set(GRAPH_ID, graph)?;
    }
    let options = Arc::new(Running(options));
    let watched: Arc<dyn Interrupt> = Arc::clone(&options) as _;
    cancel.watch(Arc::downgrade(&watched));
    Ok(options)
}

/// A failed run's error, which is none of its own when it was stopped.
fn stopped(component: &str, cancel: &Cancel, error: &ort::Error) -> Error {
    if cancel.is_cancelled() {
        Error::Cancelled { step: 0 }
    } else {
        runtime_error(component, error)
    }
}
