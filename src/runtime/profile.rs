//! ONNX Runtime's profiles: which operators ran, where, how long, and on what shapes.
//!
//! A session that is opened with profiling writes a JSON file in the Chrome trace format when it is dropped. Each run of
//! a kernel is an event of category `Node` whose arguments name operator and provider and list the shapes. Shapes of
//! weights that were prepacked are left out, and convolutions in the blocked layout have their channels rounded up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Deserialize;

use crate::error::{Error, Result};

/// What ONNX Runtime appends to a node's name for the time inside its kernel.
const KERNEL: &str = "_kernel_time";
/// The category of events that are nodes.
const NODE: &str = "Node";

/// One run of one operator.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRun {
    /// The node's name, the graph's own or one that an optimiser made.
    pub name: String,
    /// The operator, e.g. `Conv`.
    pub operator: String,
    /// The provider whose kernel ran, in ONNX Runtime's words, e.g. `CPUExecutionProvider`.
    pub provider: String,
    /// Seconds inside the kernel; on a GPU, those of starting it.
    pub seconds: f64,
    /// Shapes of its inputs; absent ones and prepacked weights are left out.
    pub inputs: Vec<Vec<usize>>,
    /// Shapes of its outputs.
    pub outputs: Vec<Vec<usize>>,
}

/// What one session ran.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// The network, e.g. `unet`.
    pub component: String,
    /// Its operators in the order in which they ran, those of every run of the session.
    pub runs: Vec<NodeRun>,
}

impl Profile {
    /// The profiles in `folder`, in the order in which their sessions were built.
    ///
    /// # Errors
    /// [`Error::Runtime`] when one cannot be read, or is not what ONNX Runtime writes.
    pub fn read_all(folder: &Path) -> Result<Vec<Self>> {
        let fail = |e: std::io::Error| fault("profile", folder, &e.to_string());
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            files.push(entry.map_err(fail)?.path());
        }
        files.sort();
        files.iter().map(|path| Self::read(path)).collect()
    }

    fn read(path: &Path) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let component = component_of(&name).unwrap_or(&name);
        let fail = |reason: &str| fault(component, path, reason);
        let text = std::fs::read_to_string(path).map_err(|e| fail(&e.to_string()))?;
        Ok(Self {
            component: component.to_owned(),
            runs: parse(&text).map_err(|e| fail(&format!("is no profile of ONNX Runtime: {e}")))?,
        })
    }
}

fn fault(component: &str, path: &Path, reason: &str) -> Error {
    Error::Runtime {
        graph: component.to_owned(),
        source: format!("{}: {reason}", path.display()).into(),
    }
}

/// Where profiles go: a file a session.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    sessions: AtomicUsize,
}

impl Folder {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            sessions: AtomicUsize::new(0),
        }
    }

    /// What the file of the next session's profile begins with; ONNX Runtime adds the time and `.json`.
    pub(super) fn next(&self, component: &str) -> PathBuf {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        self.path.join(format!("{number:06}-{component}"))
    }
}

/// The component in the name of a file that [`Folder::next`] began: `000003-unet_2026-11-25_09-43-29_912`.
fn component_of(name: &str) -> Option<&str> {
    let (_, rest) = name.split_once('-')?;
    // Date, time and milliseconds; a component's name may have underscores itself.
    rest.rsplitn(4, '_').nth(3)
}

/// An event of the trace, as far as it is read.
#[derive(Deserialize)]
struct Event {
    cat: String,
    name: String,
    /// Microseconds.
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Arguments,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Arguments {
    op_name: String,
    provider: String,
    input_type_shape: Vec<BTreeMap<String, Vec<i64>>>,
    output_type_shape: Vec<BTreeMap<String, Vec<i64>>>,
}

/// The runs of operators in a trace.
fn parse(text: &str) -> serde_json::Result<Vec<NodeRun>> {
    let events = serde_json::from_str::<Vec<Event>>(text)?;
    let runs = events.into_iter().filter_map(|event| {
        let name = event.name.strip_suffix(KERNEL)?;
        (event.cat == NODE).then(|| NodeRun {
            name: name.to_owned(),
            operator: event.args.op_name,
            provider: event.args.provider,
            seconds: event.dur / 1e6,
            inputs: shapes(event.args.input_type_shape),
            outputs: shapes(event.args.output_type_shape),
        })
    });
    Ok(runs.collect())
}

/// Shapes without their types: `[{"float": [2, 4]}]`.
fn shapes(typed: Vec<BTreeMap<String, Vec<i64>>>) -> Vec<Vec<usize>> {
    let of_one = |shape: Vec<i64>| shape.into_iter().map(|d| d.max(0) as usize).collect();
    let all = typed.into_iter().flat_map(BTreeMap::into_values);
    all.map(of_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded by ONNX Runtime 1.32 from the demo model's `UNet`; arguments that are not read were taken out.
    const RECORDED: &str = r#"[
        {"cat": "Session", "pid": 1, "tid": 1, "dur": 360092, "ts": 8, "ph": "X", "name": "session_initialization", "args": {}},
        {"cat": "Node", "pid": 1, "tid": 1, "dur": 2377, "ts": 9, "ph": "X", "name": "v87_nchwc_kernel_time", "args": {
            "input_type_shape": [{"float": [2, 4, 16, 16]}, {"float": [16, 4, 3, 3]}, {"float": [16]}], "op_name": "Conv",
            "provider": "CPUExecutionProvider", "node_index": "1233", "output_type_shape": [{"float": [2, 16, 16, 16]}]}},
        {"cat": "Node", "pid": 1, "tid": 1, "dur": 12, "ts": 19, "ph": "X", "name": "Gemm_52_kernel_time", "args": {
            "input_type_shape": [{"float": [2, 68]}, {"float": [32]}], "op_name": "Gemm", "provider": "CPUExecutionProvider",
            "output_type_shape": [{"float": [2, 32]}]}}
    ]"#;

    #[test]
    fn a_profile_lists_the_operators_that_ran() {
        let runs = parse(RECORDED).unwrap();
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0].name, "v87_nchwc");
        assert_eq!(runs[0].operator, "Conv");
        assert_eq!(runs[0].inputs[1], [16, 4, 3, 3]);
        assert!((runs[0].seconds - 0.002_377).abs() < 1e-12);
        assert_eq!(runs[1].inputs, [vec![2, 68], vec![32]]);
        assert_eq!(runs[1].outputs, [[2, 32]]);
        assert_eq!(runs[1].provider, "CPUExecutionProvider");
    }

    #[test]
    fn a_profiles_file_name_tells_the_component() {
        let component = component_of("000004-vae_decoder_2026-11-25_09-43-30_812");
        assert_eq!(component, Some("vae_decoder"));
        assert_eq!(component_of("elsewhere"), None);
    }

    #[test]
    fn what_is_no_profile_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder
                .path()
                .join("000000-unet_2026-11-25_09-43-30_812.json"),
            "{",
        )
        .unwrap();
        let message = Profile::read_all(folder.path()).unwrap_err().to_string();
        assert!(message.starts_with("unet: "), "{message}");
        assert!(message.contains("000000-unet"), "{message}");
    }
}
