//! The built-in demo model, judged: a few of the pictures of which `tronie bench --quality` judges all.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::workshop::library;

/// Shares that a few pictures should reach: looser than the bars of all, far above chance.
const SHARES: [(&str, &str, f64); 4] = [
    ("text", "style", 0.75),
    ("text", "scene", 0.75),
    ("style", "style", 0.7),
    ("identity", "identity, nearest of 100", 0.6),
];

#[test]
fn the_demo_model_paints_what_it_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let questions = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quality");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tronie"));
    command.current_dir(folder.path()).envs(library());
    command.args(["bench", "--model", "demo", "--models", "built-in", "--json"]);
    command.args([
        "--quality-only",
        "text,style,identity",
        "--quality-count",
        "24",
    ]);
    let output = command.arg("--quality").arg(questions).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let measures = told["measures"].as_array().unwrap();
    for (subject, what, least) in SHARES {
        let found = measures
            .iter()
            .find(|m| m["subject"] == subject && m["what"] == what);
        let share = found.and_then(|m| m["value"].as_f64());
        assert!(
            share.is_some_and(|share| share >= least),
            "{subject}, {what}: {share:?}, at least {least}: {measures:?}"
        );
    }
}
