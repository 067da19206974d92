//! Lists the files that are compiled into the program (see `src/model_file.rs`): every graph, and with the feature `demo`
//! the demo models. The catalogue is not in the list, because it has no choice.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Folders of the demo models, under `graphs` and `models`, begin so. Whatever else is in `models` is a user's.
const DEMO: &str = "demo";

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let demo = env::var_os("CARGO_FEATURE_DEMO").is_some();
    let mut files = Vec::new();
    for folder in ["graphs", "models"] {
        println!("cargo::rerun-if-changed={folder}");
        for name in names(&root.join(folder))? {
            let wanted = if name.starts_with(DEMO) {
                demo
            } else {
                folder == "graphs"
            };
            if wanted {
                collect(&root, format!("{folder}/{name}"), &mut files)?;
            }
        }
    }
    let list = PathBuf::from(env::var("OUT_DIR")?).join("built_in.rs");
    fs::write(list, format!("built_in!{files:#?}"))?;
    Ok(())
}

/// Adds the files in `path`, which is relative to `root`, with `/` on every system.
fn collect(root: &Path, path: String, files: &mut Vec<String>) -> Result<(), Box<dyn Error>> {
    let place = root.join(&path);
    if place.is_dir() {
        for name in names(&place)? {
            collect(root, format!("{path}/{name}"), files)?;
        }
    } else {
        files.push(path);
    }
    Ok(())
}

/// Names in a folder, sorted, without hidden ones: they are an editor's or the system's.
fn names(folder: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let name = name
            .to_str()
            .ok_or_else(|| format!("{}: {} is not UTF-8", folder.display(), name.display()))?;
        if !name.starts_with('.') {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}
