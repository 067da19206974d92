//! Makes outputs of what flows into layers.

use std::collections::HashSet;

use super::{Dim, Graph, Node, Port, PortType, WeightType};

impl Graph {
    /// Makes the inputs of the linear layers that multiply with `weights` outputs of the graph, and gives their names in
    /// the order of the weights; layers with the same input have one output. Each has dimensions `[rows, inputs]`, with
    /// one row a token or place of every picture.
    ///
    /// # Errors
    /// The first weight `[outputs, inputs]` that no layer multiplies with.
    pub fn watch<'a>(
        &mut self,
        weights: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<String>, String> {
        let known = self.outputs.iter().map(|port| port.name.clone());
        let mut known = known.collect::<HashSet<_>>();
        let mut watched = Vec::new();
        for name in weights {
            let port = self.input_of(name).ok_or_else(|| name.to_owned())?;
            watched.push(port.name.clone());
            if known.insert(port.name.clone()) {
                self.outputs.push(port);
            }
        }
        Ok(watched)
    }

    /// What flows into the layer with a weight, as an output.
    fn input_of(&self, name: &str) -> Option<Port> {
        let weight = self.weights.iter().find(|weight| weight.name == name)?;
        let [_, inputs] = weight.shape[..] else {
            return None;
        };
        let multiplies = |node: &&Node| {
            node.op_type == "Gemm" && node.inputs.get(1).is_some_and(|input| input == name)
        };
        let layer = self.nodes.iter().find(multiplies)?;
        let name = layer.inputs.first()?.clone();
        Some(Port {
            dims: vec![Dim::Named(format!("rows of {name}")), Dim::Fixed(inputs)],
            element: match weight.element {
                WeightType::F32 => PortType::F32,
                WeightType::F16 => PortType::F16,
            },
            name,
        })
    }
}
