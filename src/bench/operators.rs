//! What a profiled run did: operators with their time and work, and the nodes that fell back to the processor.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::flops::Counter;
use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::provider::Provider;
use crate::runtime::Profile;

/// ONNX Runtime's name of the provider that takes what no other does.
const PROCESSOR: &str = "CPUExecutionProvider";

/// A node that ran on the processor although another provider was asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FallenBack {
    /// The network and its model, e.g. `unet of sdxl-base`.
    pub network: String,
    /// The operator.
    pub operator: String,
    /// The node's name.
    pub node: String,
}

/// The time of all nodes of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OperatorTime {
    /// The network and its model, e.g. `unet of sdxl-base`.
    pub network: String,
    /// The operator, e.g. `Conv`.
    pub operator: String,
    /// Where it ran, in ONNX Runtime's words, e.g. `CPUExecutionProvider`.
    pub provider: String,
    /// How often.
    pub runs: usize,
    /// Seconds of all runs together; on a GPU, those of starting them.
    pub seconds: f64,
    /// Share of the network's seconds, `0.0..=1.0`.
    pub share: f64,
    /// Floating-point operations; `None` when the shapes of a run do not tell.
    pub flops: Option<u64>,
}

/// What the networks of a profiled run did.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub operators: Vec<OperatorTime>,
    pub fallen_back: Vec<FallenBack>,
}

impl Work {
    /// Reads the profiles of `pipeline`'s `networks`, which were loaded in that order, each called `unet of tiny`.
    pub fn read(pipeline: Pipeline, networks: &[String], folder: &Path) -> Result<Self> {
        let provider = pipeline.runtime().provider();
        let mut graphs = Vec::new();
        for network in networks {
            let (component, model) = network.split_once(" of ").unwrap_or((network, ""));
            graphs.push(pipeline.graph(model, component)?);
        }
        // Sessions that are kept write their profiles when they are dropped.
        drop(pipeline);
        let mut work = Self::default();
        let profiles = Profile::read_all(folder)?;
        for ((network, graph), profile) in networks.iter().zip(&graphs).zip(&profiles) {
            work.add(network, &Counter::new(graph), profile);
            if provider != Provider::Cpu {
                work.find_fallen_back(network, profile);
            }
        }
        Ok(work)
    }

    /// Operations of a component of one model, or of all models that have it; `None` when something did not tell.
    pub fn flops_of(&self, component: &str, model: Option<&str>) -> Option<u64> {
        let wanted = |o: &&OperatorTime| match o.network.split_once(" of ") {
            Some((c, m)) => c == component && model.is_none_or(|wanted| wanted == m),
            None => false,
        };
        let flops = self.operators.iter().filter(wanted).map(|o| o.flops);
        flops.sum::<Option<u64>>().filter(|f| *f > 0)
    }

    fn add(&mut self, network: &str, counter: &Counter<'_>, profile: &Profile) {
        let whole = profile.runs.iter().map(|r| r.seconds).sum::<f64>();
        let mut found = BTreeMap::<(&str, &str), OperatorTime>::new();
        for run in &profile.runs {
            let key = (run.operator.as_str(), run.provider.as_str());
            let time = found.entry(key).or_insert_with(|| OperatorTime {
                network: network.to_owned(),
                operator: run.operator.clone(),
                provider: run.provider.clone(),
                runs: 0,
                seconds: 0.0,
                share: 0.0,
                flops: Some(0),
            });
            time.runs += 1;
            time.seconds += run.seconds;
            time.flops = time.flops.zip(counter.of(run)).map(|(a, b)| a + b);
        }
        let mut times = found.into_values().collect::<Vec<_>>();
        for time in &mut times {
            time.share = if whole > 0.0 {
                time.seconds / whole
            } else {
                0.0
            };
        }
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        self.operators.extend(times);
    }

    fn find_fallen_back(&mut self, network: &str, profile: &Profile) {
        let on_processor = profile.runs.iter().filter(|r| r.provider == PROCESSOR);
        let mut nodes = on_processor
            .map(|run| FallenBack {
                network: network.to_owned(),
                operator: run.operator.clone(),
                node: run.name.clone(),
            })
            .collect::<Vec<_>>();
        nodes.sort();
        // Once, however often it ran.
        nodes.dedup();
        self.fallen_back.extend(nodes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::runtime::NodeRun;

    fn profile() -> Profile {
        let run = |name: &str, operator: &str, provider: &str, seconds| NodeRun {
            name: name.into(),
            operator: operator.into(),
            provider: provider.into(),
            seconds,
            inputs: vec![vec![2, 3], vec![3, 4]],
            outputs: vec![vec![2, 4]],
        };
        Profile {
            component: "unet".into(),
            runs: vec![
                run("a", "MatMul", "CUDAExecutionProvider", 1.0),
                run("b", "Shape", PROCESSOR, 0.5),
                run("c", "MatMul", "CUDAExecutionProvider", 2.5),
                run("b", "Shape", PROCESSOR, 0.0),
            ],
        }
    }

    #[test]
    fn nodes_are_summed_by_operator_and_the_slowest_comes_first() {
        let graph = Graph::default();
        let mut work = Work::default();
        work.add("unet of tiny", &Counter::new(&graph), &profile());
        let [products, shapes] = work.operators.as_slice() else {
            panic!("{:?}", work.operators);
        };
        assert_eq!((products.operator.as_str(), products.runs), ("MatMul", 2));
        assert!((products.share - 0.875).abs() < 1e-12);
        assert_eq!(products.flops, Some(2 * (2 * 2 * 3 * 4)));
        assert_eq!((shapes.runs, shapes.flops), (2, Some(0)));
        assert_eq!(work.flops_of("unet", Some("tiny")), products.flops);
        assert_eq!(work.flops_of("unet", Some("other")), None);
    }

    #[test]
    fn a_node_that_fell_back_is_listed_once() {
        let mut work = Work::default();
        work.find_fallen_back("unet of tiny", &profile());
        let expected = FallenBack {
            network: "unet of tiny".into(),
            operator: "Shape".into(),
            node: "b".into(),
        };
        assert_eq!(work.fallen_back, [expected]);
    }
}
