//! Graphs: weight-free ONNX files, read and checked here, rebuilt inside ONNX Runtime by `runtime`.
//!
//! The engine parses graph files itself and hands ONNX Runtime nodes and tensors one by one, for two reasons. The
//! weights lie in a memory-mapped checkpoint and enter a graph by name and address, which ONNX Runtime's own file
//! loading cannot do without copying them. And ONNX Runtime's loader is a large C++ parser that follows file names and
//! runs plug-ins found in a model; nothing from an untrusted file reaches it. What is accepted is a short list: one
//! flat graph of standard and `com.microsoft` operators with plain attributes, small constants inside, and weights that
//! are only names. Functions, subgraphs, tensor attributes, compiled engines and paths to other files are refused.
//!
//! Python twin: `onnx.load` with `onnx.checker.check_model`; the writer is `export/trace.py`.

mod check;
mod initializer;
mod layers;
mod proto;
mod watch;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;

use prost::bytes::Bytes;

use crate::error::{Error, Result};
use crate::model_file::ModelFile;
use crate::weights::content::Content;

/// The largest graph that is read, in bytes after unpacking. SDXL's `UNet`, without weights, is a few percent of it.
pub const MAX_BYTES: usize = 32 << 20;
/// The most nodes that a graph may have; SDXL's `UNet` has some thousands.
pub const MAX_NODES: usize = 50_000;

/// A checked graph: every name that a node reads is defined before it, exactly once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Graph {
    /// What a caller feeds, in the file's order.
    pub inputs: Vec<Port>,
    /// What a run returns, in the file's order.
    pub outputs: Vec<Port>,
    /// The operators, each after those whose outputs it reads.
    pub nodes: Vec<Node>,
    /// Small tensors whose values are in the graph file.
    pub constants: Vec<Constant>,
    /// Tensors whose values are in a checkpoint.
    pub weights: Vec<Weight>,
    /// Operator set versions by domain; the standard domain is the empty string.
    pub opsets: BTreeMap<String, i64>,
    /// The exporter's notes: `tronie.component`, `tronie.dialect`.
    pub metadata: BTreeMap<String, String>,
}

/// An input or output of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The tensor's name.
    pub name: String,
    /// The type of its elements.
    pub element: PortType,
    /// Its dimensions.
    pub dims: Vec<Dim>,
}

/// Element types that cross a graph's border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortType {
    /// 32-bit float.
    F32,
    /// 16-bit float; a caller feeds and gets f32 all the same.
    F16,
    /// 64-bit signed integer.
    I64,
}

/// A dimension of an input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// Always this size, at least 1.
    Fixed(usize),
    /// Chosen by the caller; equal names are equal sizes.
    Named(String),
}

/// An operator with its connections.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The operator, e.g. `Conv`.
    pub op_type: String,
    /// The operator's domain: empty (standard) or `com.microsoft`.
    pub domain: String,
    /// For messages and profiles; need not be unique, may be empty.
    pub name: String,
    /// The tensors it reads; the empty string is an optional input that is left out.
    pub inputs: Vec<String>,
    /// The tensors it makes; the empty string is an optional output that is not wanted.
    pub outputs: Vec<String>,
    /// Its attributes, by name.
    pub attributes: BTreeMap<String, Attribute>,
}

/// The value of an operator's attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// `INT`
    Int(i64),
    /// `INTS`
    Ints(Vec<i64>),
    /// `FLOAT`
    Float(f32),
    /// `FLOATS`
    Floats(Vec<f32>),
    /// `STRING`
    String(String),
    /// `STRINGS`
    Strings(Vec<String>),
}

/// A small tensor inside the graph file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constant {
    /// The tensor's name.
    pub name: String,
    /// The type of its elements.
    pub element: ConstantType,
    /// Its dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its values, row-major, little-endian; as many bytes as type and shape say.
    pub bytes: Vec<u8>,
}

/// Element types of constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConstantType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// One byte, 0 or 1.
    Bool,
}

impl ConstantType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
            Self::F16 => 2,
            Self::Bool => 1,
        }
    }
}

/// Element types in which a graph takes weights, whatever the checkpoint stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
}

/// A tensor that a checkpoint supplies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// The tensor's name, in the graph and in the checkpoint.
    pub name: String,
    /// Which of the catalogue's weights hold it, e.g. `unet`.
    pub key: String,
    /// The type in which the graph wants it.
    pub element: WeightType,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl Weight {
    /// Bytes in the type that the graph wants.
    pub fn bytes(&self) -> u64 {
        let each = match self.element {
            WeightType::F32 => 4,
            WeightType::F16 => 2,
        };
        self.shape.iter().product::<usize>() as u64 * each
    }
}

impl Graph {
    /// Reads and checks a graph file, `.onnx` or gzip of it (told apart by content).
    ///
    /// # Errors
    /// [`Error::Missing`] if the file is not there; [`Error::Graph`] with the reason if it cannot be read, is something
    /// else than an ONNX model, is damaged, or asks for anything that this engine does not run.
    pub fn load(file: impl Into<ModelFile>) -> Result<Self> {
        let file = file.into();
        let fault = |reason| Error::Graph {
            path: file.path(),
            reason,
        };
        let remedy = "correct the path in the catalogue, or make the graph with `python -m export`";
        let opened = file.open(remedy, fault)?;
        if opened.len() > MAX_BYTES as u64 {
            return Err(fault(too_large()));
        }
        let bytes = opened
            .read(MAX_BYTES as u64)
            .map_err(|e| fault(format!("cannot be read: {e}")))?;
        let bytes = match bytes {
            Cow::Borrowed(bytes) => Bytes::from_static(bytes),
            Cow::Owned(bytes) => bytes.into(),
        };
        read(bytes).map_err(fault)
    }

    /// Bytes of all weights in the types that the graph wants.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes_of(|_| true)
    }

    /// The same of the weights with some names.
    pub fn weight_bytes_of(&self, of: impl Fn(&str) -> bool) -> u64 {
        let weights = self.weights.iter().filter(|weight| of(&weight.name));
        weights.map(Weight::bytes).sum()
    }

    /// Checks a graph in memory, ONNX or gzip of it. The error is [`Error::Graph`]'s reason, which has no path here.
    ///
    /// # Errors
    /// As [`Graph::load`].
    pub fn parse(bytes: Vec<u8>) -> Result<Self, String> {
        read(bytes.into())
    }
}

fn read(bytes: Bytes) -> Result<Graph, String> {
    let bytes = if Content::of(&bytes) == Some(Content::Gzip) {
        unpack(&bytes)?.into()
    } else {
        bytes
    };
    match Content::of(&bytes) {
        None | Some(Content::Onnx) => check::model(bytes),
        Some(other) => Err(format!(
            "is {}, not an ONNX model: {}",
            other.what(),
            other.instead_of_graph()
        )),
    }
}

fn too_large() -> String {
    format!(
        "is larger than {} MiB, so it is not one of this engine's graphs, which hold no weights",
        MAX_BYTES >> 20
    )
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, String> {
    let mut decoder = flate2::bufread::GzDecoder::new(packed);
    let mut bytes = Vec::new();
    decoder
        .by_ref()
        .take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| {
            if e.kind() == std::io::ErrorKind::UnexpectedEof {
                "truncated gzip: the copy or download did not finish; fetch the file again"
                    .to_owned()
            } else {
                format!("damaged gzip ({e}): fetch the file again")
            }
        })?;
    if bytes.len() > MAX_BYTES {
        return Err(too_large());
    }
    match decoder.into_inner().len() {
        0 => Ok(bytes),
        rest => Err(format!("damaged gzip: {rest} bytes follow its end")),
    }
}
