//! Floating-point operations of what ran: profiles tell how often and on what shapes, the graph tells the weights.
//!
//! A multiplication and an addition count as two. Counted are convolutions, matrix products and attention; norms,
//! activations and biases are left out, as `torch.utils.flop_counter` does. Where the runtime rounds channels up or
//! forgets a weight's shape, the graph's own is taken, so the count is the mathematics', the same in every layout.

use std::collections::BTreeMap;

use crate::graph::{Graph, Node};
use crate::runtime::NodeRun;

/// What the optimiser of layouts appends to a convolution's output to name its own.
const BLOCKED: &str = "_nchwc";
/// Operators that reorder a weight, or give it another type, and keep its elements.
const KEEP_ELEMENTS: [&str; 5] = ["Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"];

/// The kinds of operators that are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Convolution,
    Product,
    Attention,
}

impl Kind {
    fn of(operator: &str) -> Option<Self> {
        match operator {
            "Conv" | "FusedConv" | "NhwcConv" | "NhwcFusedConv" => Some(Self::Convolution),
            "Gemm" | "FusedGemm" | "MatMul" | "FusedMatMul" => Some(Self::Product),
            "Attention" | "MultiHeadAttention" => Some(Self::Attention),
            _ => None,
        }
    }
}

/// Counts the operations of one network's nodes.
#[derive(Debug)]
pub struct Counter<'a> {
    by_name: BTreeMap<&'a str, &'a Node>,
    by_output: BTreeMap<&'a str, &'a Node>,
    weights: BTreeMap<&'a str, &'a [usize]>,
}

impl<'a> Counter<'a> {
    /// A counter for runs of `graph`.
    pub fn new(graph: &'a Graph) -> Self {
        let outputs = |node: &'a Node| node.outputs.iter().map(move |o| (o.as_str(), node));
        let constants = graph
            .constants
            .iter()
            .map(|c| (c.name.as_str(), c.shape.as_slice()));
        let weights = graph
            .weights
            .iter()
            .map(|w| (w.name.as_str(), w.shape.as_slice()));
        Self {
            by_name: graph.nodes.iter().map(|n| (n.name.as_str(), n)).collect(),
            by_output: graph.nodes.iter().flat_map(outputs).collect(),
            weights: weights.chain(constants).collect(),
        }
    }

    /// Operations of one run: 0 for operators that are not counted, `None` where shapes do not tell.
    pub fn of(&self, run: &NodeRun) -> Option<u64> {
        match Kind::of(&run.operator) {
            None => Some(0),
            Some(Kind::Attention) => attention(run),
            Some(Kind::Convolution) => self.convolution(run),
            Some(Kind::Product) => self.product(run),
        }
    }

    /// Every value of the output is a sum over the inputs of one output channel's kernel.
    fn convolution(&self, run: &NodeRun) -> Option<u64> {
        let output = run.outputs.first()?;
        let node = self.node(&run.name);
        let input = |i: usize| self.parameter(node?.inputs.get(i)?);
        // A kernel that the graph computes is known by its shape as it ran, which is rounded up in the blocked layout.
        let kernel = input(1).or_else(|| run.inputs.get(1).map(Vec::as_slice))?;
        let [kernels, inputs @ ..] = kernel else {
            return None;
        };
        let values = if run.name.ends_with(BLOCKED) {
            let channels = input(2).map_or(*kernels as u64, elements_of);
            elements_of(output) / (*output.get(1)? as u64).max(1) * channels
        } else {
            elements_of(output)
        };
        Some(2 * values * elements_of(inputs))
    }

    /// Every row of the output multiplies with each element of the second factor once.
    fn product(&self, run: &NodeRun) -> Option<u64> {
        let output = run.outputs.first()?;
        let columns = *output.last()? as u64;
        let node = self.node(&run.name);
        let weight = node.and_then(|n| self.parameter(n.inputs.get(1)?));
        let factor = match weight {
            Some(shape) => elements_of(shape),
            None => inner(run)? * columns,
        };
        Some(2 * elements_of(output) / columns.max(1) * factor)
    }

    /// The graph's node that a run is of.
    fn node(&self, name: &str) -> Option<&'a Node> {
        let blocked = name.strip_suffix(BLOCKED);
        self.by_name
            .get(name)
            .or_else(|| self.by_output.get(blocked?))
            .copied()
    }

    /// The shape of a weight, or of what it is before it is reordered.
    fn parameter(&self, tensor: &str) -> Option<&'a [usize]> {
        let mut tensor = tensor;
        loop {
            if let Some(shape) = self.weights.get(tensor) {
                return Some(shape);
            }
            let maker = self.by_output.get(tensor)?;
            if !KEEP_ELEMENTS.contains(&maker.op_type.as_str()) {
                return None;
            }
            tensor = maker.inputs.first()?;
        }
    }
}

/// The length of the sums in `[…, rows, inner]` by `[…, inner, columns]`, either of them transposed.
fn inner(run: &NodeRun) -> Option<u64> {
    let [a, _, ..] = run.inputs.as_slice() else {
        return None;
    };
    let ([.., rows, _], [.., x, y]) = (run.outputs.first()?.as_slice(), a.as_slice()) else {
        return None;
    };
    Some((x * y / (*rows).max(1)) as u64)
}

/// Scores and their product with the values: `[batch, queries, width]`, `[batch, keys, width]`, `[batch, keys, width]`.
fn attention(run: &NodeRun) -> Option<u64> {
    match run.inputs.as_slice() {
        [q, k, v, ..] if q.len() == 3 && k.len() == 3 && v.len() == 3 => Some(
            2 * elements_of(q) * k[1] as u64
                + 2 * elements_of(q) / (q[2] as u64).max(1) * elements_of(v) / (v[0] as u64).max(1),
        ),
        // Queries, keys and values in one: `[batch, tokens, heads, 3, width]`.
        [qkv, ..] if qkv.len() == 5 && qkv[3] == 3 => {
            Some(4 * elements_of(qkv) / 3 * qkv[1] as u64)
        }
        // Queries, and keys and values in one: `[batch, keys, heads, 2, width]`.
        [q, kv, ..] if q.len() == 3 && kv.len() == 5 && kv[3] == 2 => {
            Some(4 * elements_of(q) * kv[1] as u64)
        }
        _ => None,
    }
}

fn elements_of(shape: &[usize]) -> u64 {
    shape.iter().map(|d| *d as u64).product()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::graph::{Constant, ConstantType, Weight, WeightType};

    fn node(op_type: &str, name: &str, inputs: &[&str], output: &str) -> Node {
        Node {
            op_type: op_type.into(),
            domain: String::new(),
            name: name.into(),
            inputs: inputs.iter().map(ToString::to_string).collect(),
            outputs: vec![output.into()],
            attributes: BTreeMap::new(),
        }
    }

    fn graph() -> Graph {
        let weight = |name: &str, shape: &[usize]| Weight {
            name: name.into(),
            key: "unet".into(),
            shape: shape.into(),
            element: WeightType::F32,
        };
        Graph {
            nodes: vec![
                node("Conv", "Conv_0", &["x", "conv.weight", "conv.bias"], "v0"),
                node("Transpose", "Transpose_1", &["linear.weight"], "t"),
                node("MatMul", "MatMul_2", &["v0", "t"], "v2"),
                node("Slice", "Slice_3", &["conv.weight"], "part"),
                node("Conv", "Conv_4", &["x", "part", "conv.bias"], "v4"),
            ],
            constants: vec![Constant {
                name: "shape".into(),
                element: ConstantType::I64,
                shape: vec![1],
                bytes: vec![0; 8],
            }],
            weights: vec![
                weight("conv.weight", &[8, 4, 3, 3]),
                weight("conv.bias", &[8]),
                weight("linear.weight", &[32, 68]),
            ],
            ..Graph::default()
        }
    }

    fn run(operator: &str, name: &str, inputs: &[&[usize]], output: &[usize]) -> NodeRun {
        NodeRun {
            name: name.into(),
            operator: operator.into(),
            provider: "CPUExecutionProvider".into(),
            seconds: 1e-3,
            inputs: inputs.iter().map(|s| s.to_vec()).collect(),
            outputs: vec![output.to_vec()],
        }
    }

    #[test]
    fn channels_that_a_layout_rounds_up_do_not_count() {
        let graph = graph();
        let counter = Counter::new(&graph);
        let plain = run(
            "Conv",
            "Conv_0",
            &[&[2, 4, 16, 16], &[8, 4, 3, 3], &[8]],
            &[2, 8, 16, 16],
        );
        let blocked = run(
            "Conv",
            "v0_nchwc",
            &[&[2, 4, 16, 16], &[16, 4, 3, 3], &[16]],
            &[2, 16, 16, 16],
        );
        let expected = Some(2 * (8 * 4 * 9) * (2 * 16 * 16));
        assert_eq!(counter.of(&plain), expected);
        assert_eq!(counter.of(&blocked), expected);
    }

    #[test]
    fn channels_may_come_last() {
        let graph = graph();
        let last = run(
            "Conv",
            "Conv_0",
            &[&[2, 16, 16, 4], &[8, 4, 3, 3], &[8]],
            &[2, 16, 16, 8],
        );
        let expected = Some(2 * (8 * 4 * 9) * (2 * 16 * 16));
        assert_eq!(Counter::new(&graph).of(&last), expected);
    }

    #[test]
    fn a_kernel_that_the_graph_computes_has_as_many_channels_as_biases() {
        let graph = graph();
        let blocked = run(
            "Conv",
            "v4_nchwc",
            &[&[1, 4, 16, 16], &[16, 4, 2, 2], &[16]],
            &[1, 16, 16, 16],
        );
        assert_eq!(
            Counter::new(&graph).of(&blocked),
            Some(2 * (8 * 4 * 4) * (16 * 16))
        );
    }

    #[test]
    fn a_prepacked_weight_is_looked_up_in_the_graph() {
        let graph = graph();
        let packed = run("MatMul", "MatMul_2", &[&[2, 5, 68]], &[2, 5, 32]);
        assert_eq!(Counter::new(&graph).of(&packed), Some(2 * 10 * 32 * 68));
        let unknown = run("MatMul", "fused", &[&[2, 5, 68]], &[2, 5, 32]);
        assert_eq!(Counter::new(&graph).of(&unknown), None);
    }

    #[test]
    fn products_of_activations_count_by_their_shapes() {
        let graph = graph();
        let counter = Counter::new(&graph);
        let plain = run("MatMul", "a", &[&[3, 5, 7], &[3, 7, 11]], &[3, 5, 11]);
        let transposed = run("FusedMatMul", "b", &[&[3, 7, 5], &[3, 11, 7]], &[3, 5, 11]);
        for product in [plain, transposed] {
            assert_eq!(counter.of(&product), Some(2 * 3 * 5 * 7 * 11));
        }
    }

    #[test]
    fn attention_counts_scores_and_values() {
        let graph = graph();
        let counter = Counter::new(&graph);
        let cross = run(
            "MultiHeadAttention",
            "m",
            &[&[2, 64, 16], &[2, 77, 16], &[2, 77, 24]],
            &[2, 64, 24],
        );
        assert_eq!(counter.of(&cross), Some(2 * 2 * 64 * 77 * (16 + 24)));
        let packed = run(
            "MultiHeadAttention",
            "m",
            &[&[2, 64, 2, 3, 8]],
            &[2, 64, 16],
        );
        assert_eq!(counter.of(&packed), Some(4 * 2 * 64 * 64 * 16));
        assert_eq!(
            counter.of(&run("Add", "a", &[&[2, 3], &[2, 3]], &[2, 3])),
            Some(0)
        );
    }
}
