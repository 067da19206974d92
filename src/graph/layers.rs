//! Leaves out a text encoder's last layers.

use std::collections::{BTreeMap, HashSet};

use super::{Graph, Node};

/// A layer of CLIP begins with this weight's normalization.
const FIRST: &str = ".layer_norm1.weight";

impl Graph {
    /// Reads `output` so many layers earlier than it was exported, and drops what nothing needs any more.
    ///
    /// # Errors
    /// How many layers there are to leave out, when `skip` is more.
    pub fn skip_layers(&mut self, output: &str, skip: usize) -> Result<(), usize> {
        if skip == 0 {
            return Ok(());
        }
        let states = self.nodes.iter().filter_map(state_before_layer);
        let states = states.collect::<BTreeMap<usize, String>>();
        let Some(reader) = self.reader(output) else {
            return Err(0);
        };
        let read = self.nodes[reader].inputs[0].clone();
        // An encoder without a projection was exported without the layer after its output.
        let after_last = states.keys().next_back().map_or(0, |last| last + 1);
        let now = states.iter().find(|(_, state)| **state == read);
        let now = now.map_or(after_last, |(layer, _)| *layer);
        let earlier = now.checked_sub(skip).and_then(|layer| states.get(&layer));
        self.nodes[reader].inputs[0].clone_from(earlier.ok_or(now)?);
        self.drop_unused();
        Ok(())
    }

    /// The first of the nodes that only give the hidden states the shape and type of an output.
    fn reader(&self, output: &str) -> Option<usize> {
        let maker = |name: &str| {
            self.nodes
                .iter()
                .position(|node| node.outputs.iter().any(|o| o == name))
        };
        let shapes = |at: &usize| ["Reshape", "Cast"].contains(&self.nodes[*at].op_type.as_str());
        let mut at = maker(output).filter(shapes)?;
        while let Some(before) = maker(&self.nodes[at].inputs[0]).filter(shapes) {
            at = before;
        }
        Some(at)
    }

    fn drop_unused(&mut self) {
        let outputs = self.outputs.iter().map(|port| port.name.clone());
        let mut needed = outputs.collect::<HashSet<_>>();
        let mut kept = Vec::new();
        for node in std::mem::take(&mut self.nodes).into_iter().rev() {
            if node
                .outputs
                .iter()
                .any(|output| !output.is_empty() && needed.contains(output))
            {
                needed.extend(node.inputs.iter().cloned());
                kept.push(node);
            }
        }
        kept.reverse();
        self.nodes = kept;
        self.constants
            .retain(|constant| needed.contains(&constant.name));
        self.weights.retain(|weight| needed.contains(&weight.name));
    }
}

/// The number of the layer that begins with this node, and the hidden states before it.
fn state_before_layer(node: &Node) -> Option<(usize, String)> {
    let mut weights = node.inputs.iter().filter_map(|i| i.strip_suffix(FIRST));
    let layer = weights.next()?.rsplit('.').next()?.parse().ok()?;
    let state = match node.op_type.as_str() {
        "LayerNormalization" => node.inputs.first(),
        // It adds its two inputs first, and tells the sum.
        "SkipLayerNormalization" => node.outputs.get(3),
        _ => None,
    };
    Some((layer, state.filter(|s| !s.is_empty())?.clone()))
}
