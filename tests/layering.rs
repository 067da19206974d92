//! The architecture's layers, held against the source: who may import whom, who may name which library.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Modules from the bottom up. A module may import from its own layer's other modules only where `PEERS` says so, and
/// from every layer below.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &[
        "tensor",
        "progress",
        "provider",
        "memory",
        "schedule",
        "noise",
        "model_file",
        "prompt",
    ],
    &["schedulers"],
    &["manifest", "request", "plan", "files", "image"],
    &["hub", "weights", "graph", "lora"],
    &["runtime", "checkpoint"],
    &["text", "vae"],
    &["conditioning"],
    &["pipeline"],
    &["bench"],
    &["cli"],
];

/// Imports inside a layer.
const PEERS: &[(&str, &str)] = &[
    ("progress", "tensor"),
    ("schedule", "tensor"),
    ("noise", "tensor"),
    ("request", "manifest"),
    ("plan", "request"),
    ("image", "manifest"),
    ("image", "request"),
    ("image", "files"),
    ("graph", "weights"),
    ("lora", "weights"),
];

/// Libraries that only some modules may name.
const LIBRARIES: &[(&str, &[&str])] = &[
    ("ort", &["runtime"]),
    ("sysinfo", &["memory"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("ctrlc", &["cli"]),
    ("tokenizers", &["text"]),
    ("memmap2", &["weights"]),
    ("blake3", &["weights"]),
    ("dirs", &["weights"]),
    ("fs4", &["files"]),
    ("libc", &["files"]),
    ("ureq", &["hub"]),
    ("hf_hub", &["hub"]),
    ("prost", &["graph"]),
    ("pulp", &["noise"]),
    ("png", &["image"]),
    ("libjpeg_turbo_rs", &["image"]),
    ("serde_yaml", &["manifest"]),
];

/// Modules whose files may say `unsafe`: the memory mapping and the calls of ONNX Runtime.
const UNSAFE: &[&str] = &["runtime", "weights"];

const MAX_LINES: usize = 600;

fn sources() -> BTreeMap<PathBuf, (String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let inside = path.strip_prefix(&root).unwrap().to_owned();
                let module = inside.iter().next().unwrap().to_string_lossy();
                let module = module.trim_end_matches(".rs").to_owned();
                found.insert(inside, (module, std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    found
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// The modules that a text names after `crate::`, braces included.
fn imports(text: &str) -> Vec<String> {
    let code = text
        .lines()
        .filter(|l| !l.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut names = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let until = |s: &str| {
            s.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect::<String>()
        };
        match rest.strip_prefix('{') {
            Some(list) => names.extend(
                list.split('}')
                    .next()
                    .unwrap_or("")
                    .split(',')
                    .map(|n| until(n.trim())),
            ),
            None => names.push(until(rest)),
        }
    }
    names
}

#[test]
fn modules_import_only_from_below() {
    for (file, (module, text)) in sources() {
        if matches!(module.as_str(), "lib" | "main") {
            continue;
        }
        let own = layer(&module).unwrap_or_else(|| panic!("{} is in no layer", file.display()));
        for name in imports(&text) {
            let Some(other) = layer(&name) else { continue };
            let peer = PEERS.contains(&(module.as_str(), name.as_str()));
            assert!(
                other < own || name == module || (other == own && peer),
                "{} imports {name}",
                file.display()
            );
        }
    }
}

#[test]
fn libraries_stay_in_their_modules() {
    for (file, (module, text)) in sources() {
        for (library, homes) in LIBRARIES {
            let named = text
                .lines()
                .filter(|l| !l.trim_start().starts_with("//"))
                .any(|line| {
                    let path = format!("{library}::");
                    line.match_indices(&path).any(|(at, _)| {
                        let before = line[..at].chars().next_back();
                        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
                    })
                });
            assert!(
                !named || homes.contains(&module.as_str()),
                "{} names {library}",
                file.display()
            );
        }
    }
}

#[test]
fn unsafe_code_stays_where_it_is_explained() {
    for (file, (module, text)) in sources() {
        if text.contains("allow(unsafe_code)") {
            assert!(
                UNSAFE.contains(&module.as_str()),
                "{} has unsafe code",
                file.display()
            );
            assert!(
                text.contains("SAFETY:"),
                "{} does not say why its unsafe code is sound",
                file.display()
            );
        }
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for (file, (_, text)) in sources() {
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines", file.display());
    }
}
