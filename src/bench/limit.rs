//! What the machine can do: the rate of a matrix product of SDXL's size, through the same runtime, provider and threads.
//!
//! The product is the feed-forward network of SDXL's widest layers, there and back again a few times, so that copies to
//! and from a device do not show. On the processor it computes in f32, as the networks do; elsewhere in f16.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::graph::{Attribute, Constant, ConstantType, Dim, Graph, Node, Port, PortType};
use crate::memory::MemoryMode;
use crate::model_file::ModelFile;
use crate::noise::Noise;
use crate::provider::Provider;
use crate::runtime::Runtime;
use crate::tensor::Tensor;
use crate::weights::Weights;

/// Width of the layers.
const WIDTH: usize = 1280;
/// Width inside their feed-forward networks.
const INNER: usize = 5120;
/// The operator set that the product is written in.
const OPSET: i64 = 18;
/// f32 and f16 in ONNX's numbering of types.
const FLOAT: i64 = 1;
const FLOAT16: i64 = 10;
/// Repetitions of which the best counts, and the time after which no more are begun.
const REPETITIONS: usize = 8;
const PATIENCE: Duration = Duration::from_millis(1500);

/// The size of the work, by what a provider needs to be kept busy.
#[derive(Clone, Copy)]
struct Work {
    rows: usize,
    round_trips: usize,
    half: bool,
}

impl Work {
    fn of(provider: Provider) -> Self {
        match provider {
            // The tokens of a picture of 1024x1024 px.
            Provider::Cpu => Self {
                rows: 1024,
                round_trips: 1,
                half: false,
            },
            _ => Self {
                rows: 4096,
                round_trips: 16,
                half: true,
            },
        }
    }

    fn flops(self) -> u64 {
        2 * 2 * (self.rows * WIDTH * INNER * self.round_trips) as u64
    }
}

/// Floating-point operations per second of the best of several repetitions.
///
/// # Errors
/// Those of building and running a session.
pub fn measure(runtime: &Runtime) -> Result<f64> {
    let work = Work::of(runtime.provider());
    let none = Weights::open::<ModelFile>(&[])?;
    let mut session = runtime.session("limit", &graph(work), &none, MemoryMode::Fast)?;
    let input = Tensor::from(ndarray::Array2::from_elem((1, 1), 1.0_f32));
    let feeds = [("x", &input)];
    session.run(&feeds)?;
    let began = Instant::now();
    let mut best = Duration::MAX;
    for _ in 0..REPETITIONS {
        let started = Instant::now();
        session.run(&feeds)?;
        best = best.min(started.elapsed());
        if began.elapsed() > PATIENCE {
            break;
        }
    }
    Ok(work.flops() as f64 / best.as_secs_f64())
}

/// `x` spread over `[rows, WIDTH]`, multiplied there and back, and the first value of the result.
fn graph(work: Work) -> Graph {
    let mut nodes = vec![node("Expand", &["x", "shape"], "spread")];
    let mut factors = ["wide".to_owned(), "narrow".to_owned()];
    let mut last = "spread".to_owned();
    if work.half {
        for name in factors.iter_mut().chain([&mut last]) {
            let half = format!("{name}_half");
            nodes.push(cast(name, &half, FLOAT16));
            *name = half;
        }
    }
    for trip in 0..work.round_trips {
        for factor in &factors {
            let next = format!("{factor}_{trip}");
            nodes.push(node("MatMul", &[&last, factor], &next));
            last = next;
        }
    }
    // One value is enough to have everything computed.
    nodes.push(node("Slice", &[&last, "from", "to"], "one"));
    nodes.push(cast("one", "y", FLOAT));
    Graph {
        inputs: vec![scalar("x")],
        outputs: vec![scalar("y")],
        nodes,
        constants: vec![
            integers("shape", &[work.rows, WIDTH]),
            integers("from", &[0, 0]),
            integers("to", &[1, 1]),
            factor("wide", WIDTH, INNER),
            factor("narrow", INNER, WIDTH),
        ],
        opsets: BTreeMap::from([(String::new(), OPSET)]),
        ..Graph::default()
    }
}

fn scalar(name: &str) -> Port {
    Port {
        name: name.into(),
        element: PortType::F32,
        dims: vec![Dim::Fixed(1), Dim::Fixed(1)],
    }
}

fn node(op_type: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: op_type.into(),
        domain: String::new(),
        name: output.into(),
        inputs: inputs.iter().map(ToString::to_string).collect(),
        outputs: vec![output.into()],
        attributes: BTreeMap::new(),
    }
}

fn cast(from: &str, to: &str, element: i64) -> Node {
    let attributes = BTreeMap::from([("to".to_owned(), Attribute::Int(element))]);
    Node {
        attributes,
        ..node("Cast", &[from], to)
    }
}

fn integers(name: &str, values: &[usize]) -> Constant {
    Constant {
        name: name.into(),
        element: ConstantType::I64,
        shape: vec![values.len()],
        bytes: values
            .iter()
            .flat_map(|d| (*d as i64).to_le_bytes())
            .collect(),
    }
}

/// Random values whose products keep the size of what they are multiplied with.
fn factor(name: &str, rows: usize, columns: usize) -> Constant {
    let scale = (rows as f32).powf(-0.5);
    let values = Noise::new(rows as u64).normal([1, 1, rows, columns]);
    Constant {
        name: name.into(),
        element: ConstantType::F32,
        shape: vec![rows, columns],
        bytes: values
            .iter()
            .flat_map(|v| (v * scale).to_le_bytes())
            .collect(),
    }
}
