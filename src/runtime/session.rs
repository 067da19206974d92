//! One network, ready to run: inputs bound by name and checked, outputs copied out, stopped by the cancel switch.

use std::borrow::Cow;
use std::sync::Arc;

use ort::session::{NoSelectedOutputs, RunOptions, SessionInputValue};
use ort::value::{TensorElementType, TensorRef, ValueType};

use super::{Runtime, model, options, runtime_error};
use crate::error::{Error, Result};
use crate::graph::{Dim, Graph, Port, PortType};
use crate::memory::MemoryMode;
use crate::progress::{Cancel, Interrupt};
use crate::tensor::{Tensor, TensorMap};
use crate::weights::{WeightData, Weights};

/// An input by name.
pub type Feed<'a> = (&'a str, &'a Tensor);

/// What stops a run inside a network: ONNX Runtime looks at it between operators.
struct Running(RunOptions<NoSelectedOutputs>);

impl Interrupt for Running {
    fn interrupt(&self) {
        // A run that cannot be told to stop ends at the next step, where the switch is looked at.
        let _ = self.0.terminate();
    }
}

/// A network on a provider.
pub struct Session {
    // Declared before the weights it reads, so that it is dropped before them.
    inner: ort::session::Session,
    component: String,
    inputs: Vec<Port>,
    options: Arc<Running>,
    cancel: Cancel,
    _weights: Vec<WeightData>,
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
            .map(|w| weights.tensor_f32(&w.name, &w.shape))
            .collect::<Result<Vec<_>>>()?;
        let fail = |e: ort::Error| runtime_error(component, &e);
        let model = model::build(graph, &data).map_err(fail)?;
        let builder = options::builder(runtime, component, graph, memory)?;
        let inner = model.into_session(&builder).map_err(fail)?;
        let options = Arc::new(Running(RunOptions::new().map_err(fail)?));
        let watched: Arc<dyn Interrupt> = Arc::clone(&options) as _;
        runtime.cancel.watch(Arc::downgrade(&watched));
        Ok(Self {
            inner,
            component: component.to_owned(),
            inputs: graph.inputs.clone(),
            options,
            cancel: runtime.cancel.clone(),
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
        let component = &self.component;
        let fail = |e: ort::Error| runtime_error(component, &e);
        let cancel = &self.cancel;
        if cancel.is_cancelled() {
            return Err(Error::Cancelled { step: 0 });
        }
        let inputs = feeds
            .iter()
            .map(|(name, tensor)| bind(name, tensor))
            .collect::<ort::Result<Vec<_>>>();
        let inputs = inputs.map_err(fail)?;
        let stopped = |e| {
            if cancel.is_cancelled() {
                Error::Cancelled { step: 0 }
            } else {
                fail(e)
            }
        };
        let outputs = self
            .inner
            .run_with_options(inputs, &self.options.0)
            .map_err(stopped)?;
        let mut result = TensorMap::new();
        for (name, value) in &outputs {
            let tensor = match value.dtype() {
                ValueType::Tensor {
                    ty: TensorElementType::Int64,
                    ..
                } => value
                    .try_extract_array::<i64>()
                    .map_err(fail)?
                    .to_owned()
                    .into(),
                _ => value
                    .try_extract_array::<f32>()
                    .map_err(fail)?
                    .to_owned()
                    .into(),
            };
            result.insert(name.to_owned(), tensor);
        }
        Ok(result)
    }

    /// Runs the network and gives its f32 output called `wanted`.
    ///
    /// # Errors
    /// As [`Session::run`], and [`Error::Contract`] when there is no such output.
    pub fn run_for(&mut self, feeds: &[Feed<'_>], wanted: &str) -> Result<ndarray::ArrayD<f32>> {
        match self.run(feeds)?.remove(wanted) {
            Some(Tensor::F32(array)) => Ok(array),
            Some(Tensor::I64(_)) => Err(self.mismatch(wanted, "an f32 output", "an i64 output")),
            None => Err(self.mismatch(wanted, "such an output", "none in the graph")),
        }
    }

    fn check(&self, feeds: &[Feed<'_>]) -> Result<()> {
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
                (PortType::F32, Tensor::F32(_)) | (PortType::I64, Tensor::I64(_))
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

    fn mismatch(&self, tensor: &str, expected: &str, actual: &str) -> Error {
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
        PortType::F32 => "f32",
        PortType::I64 => "i64",
    };
    let dims = port.dims.iter().map(|dim| match dim {
        Dim::Fixed(size) => size.to_string(),
        Dim::Named(name) => name.clone(),
    });
    format!("{element} [{}]", dims.collect::<Vec<_>>().join(", "))
}

fn bind<'a>(
    name: &'a str,
    tensor: &'a Tensor,
) -> ort::Result<(Cow<'a, str>, SessionInputValue<'a>)> {
    let value = match tensor {
        Tensor::F32(array) => TensorRef::from_array_view(array.view())?.into(),
        Tensor::I64(array) => TensorRef::from_array_view(array.view())?.into(),
    };
    Ok((Cow::Borrowed(name), value))
}
