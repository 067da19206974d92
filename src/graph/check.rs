//! From protobuf messages to a checked [`Graph`]: everything that is refused is refused here, by name.
//!
//! Python twin: `onnx.checker`.

use std::collections::{BTreeMap, HashSet};

use prost::Message;
use prost::bytes::Bytes;

use super::initializer::{self, Initializer};
use super::{Attribute, Constant, Dim, Graph, MAX_NODES, Node, Port, PortType, Weight, proto};
use crate::error::quoted;

/// IR 4 is the first in which initializers need not be inputs too; later ones change nothing that is accepted here.
const IR_VERSIONS: std::ops::RangeInclusive<i64> = 4..=14;
const STANDARD_OPSETS: std::ops::RangeInclusive<i64> = 18..=21;
const CONTRIB: &str = "com.microsoft";
const AGAIN: &str = "export the graph again with `python -m export`";

type Checked<T> = Result<T, String>;

/// Decodes one message; `what` names it in the error.
pub(super) fn decode<M: Message + Default>(bytes: Bytes, what: &str) -> Checked<M> {
    M::decode(bytes).map_err(|e| format!("is not an ONNX model, or a damaged one: {what}: {e}"))
}

/// A name that can go to ONNX Runtime, which takes C strings.
pub(super) fn named(name: String, what: &str) -> Checked<String> {
    if name.is_empty() {
        return Err(format!("{what} has no name"));
    }
    without_nul(name, what)
}

fn without_nul(text: String, what: &str) -> Checked<String> {
    if text.contains('\0') {
        Err(format!("{what} {} has a NUL in it", quoted(&text)))
    } else {
        Ok(text)
    }
}

pub(super) fn model(bytes: Bytes) -> Checked<Graph> {
    let model: proto::Model = decode(bytes, "the model")?;
    let graph = model
        .graph
        .ok_or("is not an ONNX model: it holds no graph")?;
    let ir = model
        .ir_version
        .ok_or("is not an ONNX model: it does not say its IR version")?;
    if !IR_VERSIONS.contains(&ir) {
        let (oldest, newest) = IR_VERSIONS.into_inner();
        return Err(format!(
            "has ONNX IR version {ir}, and {oldest} to {newest} can be read: {AGAIN}"
        ));
    }
    let graph: proto::Graph = decode(graph, "its graph")?;
    let refused = [
        (&model.functions, "local functions"),
        (&model.training_info, "training information"),
        (&graph.sparse_initializer, "sparse initializers"),
    ];
    if let Some((_, what)) = refused.iter().find(|(messages, _)| !messages.is_empty()) {
        return Err(format!(
            "holds {what}, which this engine does not run: {AGAIN}"
        ));
    }
    let opsets = opsets(model.opset_import)?;
    let metadata = metadata(model.metadata_props.into_iter().chain(graph.metadata_props))?;
    let mut defined = Defined(HashSet::new());
    let inputs = ports(graph.input, "input")?;
    for input in &inputs {
        defined.add(&input.name, "input")?;
    }
    let (constants, weights) = initializers(graph.initializer, &mut defined)?;
    let nodes = nodes(graph.node, &opsets, &mut defined)?;
    let outputs = ports(graph.output, "output")?;
    check_outputs(&outputs, &defined)?;
    Ok(Graph {
        inputs,
        outputs,
        nodes,
        constants,
        weights,
        opsets,
        metadata,
    })
}

fn metadata(entries: impl Iterator<Item = Bytes>) -> Checked<BTreeMap<String, String>> {
    let mut metadata = BTreeMap::new();
    for entry in entries {
        let proto::StringEntry { key, value } = decode(entry, "its metadata")?;
        if metadata.get(&key).is_some_and(|other| *other != value) {
            return Err(format!("metadata {} has two values", quoted(&key)));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn initializers(
    tensors: Vec<Bytes>,
    defined: &mut Defined,
) -> Checked<(Vec<Constant>, Vec<Weight>)> {
    let (mut constants, mut weights) = (Vec::new(), Vec::new());
    for bytes in tensors {
        match initializer::read(decode(bytes, "an initializer")?)? {
            Initializer::Constant(constant) => {
                defined.add(&constant.name, "initializer")?;
                constants.push(constant);
            }
            Initializer::Weight(weight) => {
                defined.add(&weight.name, "initializer")?;
                weights.push(weight);
            }
        }
    }
    Ok((constants, weights))
}

/// The names that have a value so far.
struct Defined(HashSet<String>);

impl Defined {
    fn add(&mut self, name: &str, what: &str) -> Checked<()> {
        if self.0.insert(name.to_owned()) {
            Ok(())
        } else {
            Err(format!("{what} {} is defined a second time", quoted(name)))
        }
    }
}

fn opsets(imports: Vec<Bytes>) -> Checked<BTreeMap<String, i64>> {
    let mut opsets = BTreeMap::new();
    for import in imports {
        let proto::OperatorSet { domain, version } = decode(import, "its operator sets")?;
        let (domain, allowed) = match domain.as_str() {
            "" | "ai.onnx" => ("", STANDARD_OPSETS),
            CONTRIB => (CONTRIB, 1..=1),
            _ => {
                let shown = quoted(&domain);
                return Err(format!(
                    "uses the operator domain {shown}; only the standard one and `{CONTRIB}` are run"
                ));
            }
        };
        if !allowed.contains(&version) {
            let (oldest, newest) = allowed.into_inner();
            let domain = if domain.is_empty() {
                "the standard operators"
            } else {
                domain
            };
            return Err(format!(
                "uses version {version} of {domain}, and {oldest} to {newest} can be run: {AGAIN}"
            ));
        }
        if opsets.insert(domain.to_owned(), version).is_some() {
            return Err(format!("imports the operator domain `{domain}` twice"));
        }
    }
    if opsets.contains_key("") {
        Ok(opsets)
    } else {
        Err("imports no standard operators".into())
    }
}

fn ports(infos: Vec<Bytes>, what: &str) -> Checked<Vec<Port>> {
    infos
        .into_iter()
        .map(|info| port(decode(info, what)?, what))
        .collect()
}

fn port(info: proto::ValueInfo, what: &str) -> Checked<Port> {
    let name = named(info.name, what)?;
    let fault = |reason: &str| format!("{what} {}: {reason}", quoted(&name));
    let tensor = info
        .r#type
        .and_then(|t| t.tensor)
        .ok_or_else(|| fault("is not a tensor"))?;
    let element = match tensor.elem_type {
        initializer::FLOAT => PortType::F32,
        initializer::FLOAT16 => PortType::F16,
        initializer::INT64 => PortType::I64,
        other => {
            let type_name = initializer::type_name(other);
            return Err(fault(&format!(
                "has element type {type_name}, and FLOAT, FLOAT16 and INT64 are allowed"
            )));
        }
    };
    let shape = tensor.shape.ok_or_else(|| fault("says no shape"))?;
    let dims = shape
        .dim
        .into_iter()
        .enumerate()
        .map(|(axis, dim)| match dim.kind {
            Some(proto::DimensionKind::Value(size)) => match usize::try_from(size) {
                Ok(size) if size > 0 => Ok(Dim::Fixed(size)),
                _ => Err(fault(&format!("dimension {axis} has size {size}"))),
            },
            Some(proto::DimensionKind::Param(name)) if !name.is_empty() => {
                without_nul(name, "dimension name").map(Dim::Named)
            }
            _ => Err(fault(&format!(
                "dimension {axis} has neither size nor name"
            ))),
        });
    let dims = dims.collect::<Checked<_>>()?;
    Ok(Port {
        name,
        element,
        dims,
    })
}

fn check_outputs(outputs: &[Port], defined: &Defined) -> Checked<()> {
    if outputs.is_empty() {
        return Err("has no outputs".into());
    }
    let mut seen = HashSet::new();
    for Port { name, .. } in outputs {
        if !seen.insert(name) {
            return Err(format!("output {} is listed twice", quoted(name)));
        }
        if !defined.0.contains(name) {
            return Err(format!("output {} is made by nothing", quoted(name)));
        }
    }
    Ok(())
}

fn nodes(
    messages: Vec<Bytes>,
    opsets: &BTreeMap<String, i64>,
    defined: &mut Defined,
) -> Checked<Vec<Node>> {
    if messages.len() > MAX_NODES {
        return Err(format!(
            "has {} nodes, and {MAX_NODES} are allowed",
            messages.len()
        ));
    }
    let nodes = messages.into_iter().enumerate().map(|(index, message)| {
        let node =
            node(decode(message, "a node")?).map_err(|reason| format!("node {index}{reason}"))?;
        let fault = |reason: String| format!("node {index} ({}): {reason}", quoted(&node.op_type));
        if !opsets.contains_key(&node.domain) {
            return Err(fault(format!(
                "its operator domain {} is not imported or not allowed",
                quoted(&node.domain)
            )));
        }
        if let Some(input) = node
            .inputs
            .iter()
            .find(|name| !name.is_empty() && !defined.0.contains(*name))
        {
            return Err(fault(format!(
                "reads {}, which nothing before it defines",
                quoted(input)
            )));
        }
        for output in node.outputs.iter().filter(|name| !name.is_empty()) {
            defined.add(output, "output").map_err(fault)?;
        }
        Ok(node)
    });
    nodes.collect()
}

/// Checks a node by itself. An error begins with what follows "node N".
fn node(node: proto::Node) -> Checked<Node> {
    let op_type = named(node.op_type, ": its operator")?;
    let fault = |reason: String| format!(" ({}): {reason}", quoted(&op_type));
    if op_type == "EPContext" {
        return Err(fault("is an engine compiled for one device, which can hold anything: use the graph it was made from".into()));
    }
    if !node.overload.is_empty() {
        return Err(fault("calls a local function".into()));
    }
    let mut attributes = BTreeMap::new();
    for message in node.attribute {
        let (name, value) = attribute(decode(message, "an attribute")?).map_err(fault)?;
        let shown = quoted(&name);
        if attributes.insert(name, value).is_some() {
            return Err(fault(format!("attribute {shown} is given twice")));
        }
    }
    let names = |list: Vec<String>, what: &str| -> Checked<Vec<String>> {
        list.into_iter()
            .map(|name| without_nul(name, what).map_err(fault))
            .collect()
    };
    let domain = if node.domain == "ai.onnx" {
        String::new()
    } else {
        node.domain
    };
    let inputs = names(node.input, "input")?;
    let outputs = names(node.output, "output")?;
    let name = without_nul(node.name, "node name").map_err(fault)?;
    Ok(Node {
        op_type,
        domain,
        name,
        inputs,
        outputs,
        attributes,
    })
}

fn attribute(attribute: proto::Attribute) -> Checked<(String, Attribute)> {
    let name = named(attribute.name, "an attribute")?;
    let fault = |reason: String| format!("attribute {}: {reason}", quoted(&name));
    if !attribute.ref_attr_name.is_empty() {
        return Err(fault("refers to a function's attribute".into()));
    }
    let text = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_owned())
            .map_err(|_| fault("is a string that is not UTF-8".into()))?;
        without_nul(text, "string").map_err(fault)
    };
    let value = match attribute.kind {
        1 => Attribute::Float(attribute.f),
        2 => Attribute::Int(attribute.i),
        3 => Attribute::String(text(&attribute.s)?),
        6 => Attribute::Floats(attribute.floats),
        7 => Attribute::Ints(attribute.ints),
        8 => Attribute::Strings(
            attribute
                .strings
                .iter()
                .map(|s| text(s))
                .collect::<Checked<_>>()?,
        ),
        kind => {
            let kind = match kind {
                4 | 9 => "a tensor",
                5 | 10 => "a subgraph",
                11 | 12 => "a sparse tensor",
                13 | 14 => "a type",
                _ => "of unknown type",
            };
            return Err(fault(format!(
                "is {kind}; numbers, strings and lists of them are allowed: {AGAIN}"
            )));
        }
    };
    Ok((name, value))
}
