//! Rebuilds a weight-free graph in ONNX Runtime, its initializers pointing into mapped weight files.
//!
//! The Model Editor API is used because it is the one way in that is zero-copy and sees the true weights at every
//! optimisation level. (`AddInitializer` over a graph with external data is zero-copy too, but the layout optimiser
//! reads the external file instead and computes with whatever is there; `AddExternalInitializers` copies.)

use std::ffi::CString;

use ort::AsPointer;
use ort::editor::{Graph as OrtGraph, Model, Node, Opset};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::operator::Attribute as OrtAttribute;
use ort::value::{
    Outlet, PrimitiveTensorElementType, Shape, SymbolicDimensions, Tensor, TensorElementType,
    TensorRefMut, ValueType,
};

use half::f16;

use crate::error::Result as Fallible;
use crate::graph::{
    Attribute, Constant, ConstantType, Dim, Graph, Port, PortType, Weight, WeightType,
};
use crate::weights::{Element, WeightData, Weights};

/// Bytes below which ONNX Runtime wants a tensor of its own, so that shape inference can read it.
const SMALLEST_MAPPED: usize = 128;

/// A weight in the type that its graph wants.
#[derive(Debug)]
pub(super) enum Held {
    F32(WeightData),
    F16(WeightData<f16>),
}

impl Held {
    pub(super) fn read(weights: &Weights, weight: &Weight) -> Fallible<Self> {
        Ok(match weight.element {
            WeightType::F32 => Self::F32(weights.tensor_f32(&weight.name, &weight.shape)?),
            WeightType::F16 => Self::F16(weights.tensor_f16(&weight.name, &weight.shape)?),
        })
    }

    fn add_to(&self, graph: &mut OrtGraph, name: &str) -> ort::Result<()> {
        match self {
            Self::F32(data) => add_weight(graph, name, data),
            Self::F16(data) => add_weight(graph, name, data),
        }
    }
}

/// The graph as an ONNX Runtime model. `weights` holds the data of `graph.weights`, in that order, and must outlive
/// every session made from the model.
pub(super) fn build(graph: &Graph, weights: &[Held]) -> ort::Result<Model> {
    let mut built = OrtGraph::new()?;
    built.set_inputs(graph.inputs.iter().map(outlet))?;
    built.set_outputs(graph.outputs.iter().map(outlet))?;
    for (weight, data) in graph.weights.iter().zip(weights) {
        data.add_to(&mut built, &weight.name)?;
    }
    for constant in &graph.constants {
        add_constant(&mut built, constant)?;
    }
    for node in &graph.nodes {
        let attributes = node
            .attributes
            .iter()
            .map(|(n, v)| attribute(n, v))
            .collect::<ort::Result<Vec<_>>>()?;
        built.add_node(Node::new(
            &node.op_type,
            &node.domain,
            &node.name,
            &node.inputs,
            &node.outputs,
            attributes,
        )?)?;
    }
    let opsets = graph
        .opsets
        .iter()
        .map(|(d, v)| Opset::new(d, *v as u32))
        .collect::<ort::Result<Vec<_>>>()?;
    let mut model = Model::new(opsets)?;
    model.set_graph(built)?;
    Ok(model)
}

fn outlet(port: &Port) -> Outlet {
    let ty = match port.element {
        PortType::F32 => TensorElementType::Float32,
        PortType::F16 => TensorElementType::Float16,
        PortType::I64 => TensorElementType::Int64,
    };
    let dims = port.dims.iter().map(|d| match d {
        Dim::Fixed(n) => *n as i64,
        Dim::Named(_) => -1,
    });
    let symbols = port.dims.iter().map(|d| match d {
        Dim::Fixed(_) => String::new(),
        Dim::Named(name) => name.clone(),
    });
    Outlet::new(
        &port.name,
        ValueType::Tensor {
            ty,
            shape: Shape::new(dims),
            dimension_symbols: SymbolicDimensions::new(symbols),
        },
    )
}

fn add_weight<T>(graph: &mut OrtGraph, name: &str, data: &WeightData<T>) -> ort::Result<()>
where
    T: Element + PrimitiveTensorElementType + std::fmt::Debug,
{
    if std::mem::size_of_val(data.as_slice()) < SMALLEST_MAPPED {
        add_small(graph, name, data)
    } else {
        add_mapped(graph, name, data)
    }
}

/// Adds an initializer that reads straight from the mapping.
#[allow(unsafe_code)]
fn add_mapped<T>(graph: &mut OrtGraph, name: &str, data: &WeightData<T>) -> ort::Result<()>
where
    T: Element + PrimitiveTensorElementType + std::fmt::Debug,
{
    let info = MemoryInfo::new(
        AllocationDevice::CPU,
        0,
        AllocatorType::Device,
        MemoryType::Default,
    )?;
    let shape = Shape::new(data.shape().iter().map(|d| *d as i64));
    let pointer = data.as_slice().as_ptr().cast_mut().cast();
    // SAFETY: the pointer covers `shape` values of type `T` and stays valid as long as `data`, which the session keeps alive
    // after this. ONNX Runtime never writes to an initializer.
    let value = unsafe { TensorRefMut::<T>::from_raw(info, pointer, shape)? };
    let name = CString::new(name)?;
    let editor = ort::editor::editor_api()?;
    // SAFETY: graph and value are live. On success the graph owns the value, so it must not be released here too.
    let status = unsafe {
        (editor.AddInitializerToGraph)(
            graph.ptr().cast_mut(),
            name.as_ptr(),
            value.ptr().cast_mut(),
            true,
        )
    };
    if status.0.is_null() {
        std::mem::forget(value);
        return Ok(());
    }
    // SAFETY: a non-null status is an error object of ONNX Runtime that is ours to release.
    unsafe { ort::Error::result_from_status(status) }
}

fn add_small<T>(graph: &mut OrtGraph, name: &str, data: &WeightData<T>) -> ort::Result<()>
where
    T: Element + PrimitiveTensorElementType + std::fmt::Debug,
{
    let shape = data.shape().iter().map(|d| *d as i64).collect::<Vec<_>>();
    let mut tensor = Tensor::<T>::new(&Allocator::default(), shape)?;
    tensor
        .extract_tensor_mut()
        .1
        .copy_from_slice(data.as_slice());
    graph.add_initializer(name, tensor, false)
}

fn add_constant(graph: &mut OrtGraph, constant: &Constant) -> ort::Result<()> {
    match constant.element {
        ConstantType::F32 => add_values(graph, constant, f32::from_le_bytes),
        ConstantType::F16 => add_values(graph, constant, f16::from_le_bytes),
        ConstantType::I64 => add_values(graph, constant, i64::from_le_bytes),
        ConstantType::I32 => add_values(graph, constant, i32::from_le_bytes),
        ConstantType::Bool => add_values(graph, constant, |[byte]: [u8; 1]| byte != 0),
    }
}

/// Adds an initializer that ONNX Runtime owns.
fn add_values<T, const N: usize>(
    graph: &mut OrtGraph,
    constant: &Constant,
    decode: impl Fn([u8; N]) -> T,
) -> ort::Result<()>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Clone,
{
    let shape = constant.shape.iter().map(|d| *d as i64).collect::<Vec<_>>();
    let mut tensor = Tensor::<T>::new(&Allocator::default(), shape)?;
    let (values, _) = constant.bytes.as_chunks::<N>();
    for (slot, bytes) in tensor.extract_tensor_mut().1.iter_mut().zip(values) {
        *slot = decode(*bytes);
    }
    graph.add_initializer(&constant.name, tensor, false)
}

fn attribute(name: &str, value: &Attribute) -> ort::Result<OrtAttribute> {
    match value {
        Attribute::Int(v) => OrtAttribute::new(name, *v),
        Attribute::Ints(v) => OrtAttribute::new(name, v.clone()),
        Attribute::Float(v) => OrtAttribute::new(name, *v),
        Attribute::Floats(v) => OrtAttribute::new(name, v.clone()),
        Attribute::String(v) => OrtAttribute::new(name, v.clone()),
        Attribute::Strings(v) => OrtAttribute::new(name, v.clone()),
    }
}
