//! `tronie cache` from outside.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::expansions::{Shop, patterns};

/// A cache with the expansions of two files.
fn filled() -> Shop {
    let shop = Shop::new();
    let mut bytes = patterns();
    shop.expanded(&shop.saved("a.safetensors", &bytes));
    *bytes.last_mut().unwrap() ^= 1;
    shop.expanded(&shop.saved("b.safetensors", &bytes));
    assert_eq!(shop.entries().len(), 2);
    shop
}

fn run(setting: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tronie"))
        .arg("cache")
        .args(arguments)
        .env("TRONIE_CACHE", setting)
        .output()
        .unwrap()
}

fn text(shop: &Shop, arguments: &[&str]) -> String {
    let output = run(&shop.folder.path().join("cache"), arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(shop: &Shop, arguments: &[&str]) -> Value {
    serde_json::from_str(&text(shop, arguments)).unwrap()
}

fn refusal(shop: &Shop, arguments: &[&str]) -> String {
    let output = run(&shop.folder.path().join("cache"), arguments);
    assert_eq!(output.status.code(), Some(2));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn it_lists_entries_with_sources_sizes_and_total() {
    let shop = filled();
    fs::remove_file(shop.folder.path().join("b.safetensors")).unwrap();
    let listed = text(&shop, &[]);
    assert_eq!(listed, text(&shop, &["list"]));
    let folder = shop.cache.folder().unwrap();
    assert!(listed.starts_with(folder.to_str().unwrap()), "{listed}");
    for part in [
        "524.",
        "a.safetensors\n",
        "b.safetensors  (gone)",
        "ago  no source left",
        "2 entries, 1.0 MB",
    ] {
        assert!(listed.contains(part), "no {part:?} in: {listed}");
    }
    let value = json(&shop, &["--json"]);
    assert_eq!(value["folder"], folder.to_str().unwrap());
    let entries = value["entries"].as_array().unwrap();
    let sizes: u64 = entries.iter().map(|e| e["bytes"].as_u64().unwrap()).sum();
    assert_eq!(value["total-bytes"], sizes);
    for entry in entries {
        let file = Path::new(entry["file"].as_str().unwrap());
        assert_eq!(fs::metadata(file).unwrap().len(), entry["bytes"]);
        let source = &entry["sources"][0];
        let gone = source["path"].as_str().unwrap().ends_with("b.safetensors");
        assert_eq!(entry["orphan"], gone);
        assert_eq!(source["state"], if gone { "gone" } else { "present" });
        assert!(entry["last-used"].as_u64().unwrap() > 1_700_000_000);
    }
}

#[test]
fn it_clears_one_entry_by_key_or_source_and_says_what_it_does_not_know() {
    let shop = filled();
    let source = shop.folder.path().join("a.safetensors");
    let removed = json(&shop, &["clear", "--json", source.to_str().unwrap()]);
    assert_eq!(removed["removed"].as_array().unwrap().len(), 1);
    let [left] = &shop.entries()[..] else {
        panic!("{:?}", shop.entries())
    };
    assert!(left.sources[0].path.ends_with("b.safetensors"));
    assert!(refusal(&shop, &["clear", source.to_str().unwrap()]).contains("there is no entry"));
    assert!(refusal(&shop, &["clear", ""]).contains("give more digits"));
    let freed = text(&shop, &["clear", &left.key[..12]]);
    assert!(
        freed.contains(&format!("removed {}", &left.key[..12])),
        "{freed}"
    );
    assert!(shop.entries().is_empty());
}

#[test]
fn it_clears_what_has_no_source_left_and_then_all() {
    let shop = filled();
    fs::write(shop.folder.path().join("a.safetensors"), b"other").unwrap();
    text(&shop, &["clear", "--orphans"]);
    assert!(shop.entries()[0].sources[0].path.ends_with("b.safetensors"));
    assert_eq!(shop.entries().len(), 1);
    fs::write(
        shop.cache.folder().unwrap().join(".tronie-x.part"),
        [0; 100],
    )
    .unwrap();
    assert!(text(&shop, &[]).contains("0.1 kB unfinished"));
    text(&shop, &["clear"]);
    assert!(shop.entries().is_empty());
    assert_eq!(shop.cache.unfinished_bytes(), 0);
    assert!(text(&shop, &[]).contains("0 entries"));
    // The checkpoints are the user's.
    assert!(shop.folder.path().join("b.safetensors").is_file());
}

#[test]
fn a_folder_that_is_not_there_or_turned_off_is_empty() {
    let shop = Shop::new();
    assert!(text(&shop, &[]).contains("0 entries, 0.0 kB"));
    assert!(text(&shop, &["clear"]).contains("0.0 kB freed"));
    assert!(!shop.cache.folder().unwrap().exists());
    let off = run(Path::new("off"), &[]);
    assert!(
        String::from_utf8(off.stdout)
            .unwrap()
            .contains("TRONIE_CACHE is off")
    );
}
