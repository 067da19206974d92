//! Lists the files that are compiled into the program (see `src/model_file.rs`): what the catalogue names of graphs and,
//! with the feature `demo`, of the demo models. The catalogue is not in the list, because it has no choice.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

const CATALOGUE: &str = "models.yaml";
/// Whatever else the catalogue names on this disk is a user's.
const GRAPHS: &str = "graphs/";
/// Where the demo models are.
const DEMO: [&str; 2] = ["models/demo", "graphs/demo"];
/// What the demo's sheet shows; no entry of the catalogue names it.
const SHEET: &str = "models/demo-pictures";

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    for watched in [CATALOGUE, "graphs", "models"] {
        if root.join(watched).exists() {
            println!("cargo::rerun-if-changed={watched}");
        }
    }
    let demo = env::var_os("CARGO_FEATURE_DEMO").is_some();
    let catalogue = fs::read_to_string(root.join(CATALOGUE))?;
    let mut files = catalogue
        .lines()
        .filter_map(path)
        .filter(|path| is_wanted(path, demo) && root.join(path).is_file())
        .map(str::to_owned)
        .collect::<Vec<_>>();
    if demo && root.join(SHEET).is_dir() {
        for entry in fs::read_dir(root.join(SHEET))? {
            let name = entry?.file_name();
            let name = name
                .to_str()
                .ok_or("a name in the demo's sheet is not UTF-8")?;
            files.push(format!("{SHEET}/{name}"));
        }
    }
    files.sort_unstable();
    files.dedup();
    let list = Path::new(&env::var("OUT_DIR")?).join("built_in.rs");
    fs::write(list, format!("built_in!{files:#?}"))?;
    Ok(())
}

/// What a line of the catalogue says after its key or dash: a path, if it is one. The exporter writes one a line.
fn path(line: &str) -> Option<&str> {
    let (_, value) = line.rsplit_once(": ").or_else(|| line.split_once("- "))?;
    Some(value.trim())
}

fn is_wanted(path: &str, demo: bool) -> bool {
    if DEMO.iter().any(|place| path.starts_with(place)) {
        demo
    } else {
        path.starts_with(GRAPHS)
    }
}
