//! `tronie lora zip` on the tiny model, with the LoRAs and mergers of `export/golden/zip.py`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/safetensors_file.rs"]
mod safetensors_file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ndarray::Array2;
use safetensors::SafeTensors;
use safetensors_file::{f32_bytes, well_formed};
use tempfile::TempDir;
use tronie::graph::Graph;
use tronie::lora::{Fit, LoraFile, Mergers, Moments, Pair, Terms};
use tronie::model_file::ModelFile;
use tronie::weights::Weights;

const PROMPTS: [&str; 4] = [
    "--prompt-content",
    "a photo of a small dog in a bucket",
    "--prompt-style",
    "waves, an ink painting",
];
const PICTURES: [&str; 8] = [
    "--steps",
    "4",
    "--width",
    "128",
    "--height",
    "128",
    "--guidance",
    "5",
];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden(name: &str) -> PathBuf {
    root("tests/golden/zip").join(format!("{name}.safetensors"))
}

/// Runs `lora zip` of two LoRAs on the tiny model; the result goes to `out.safetensors` in a folder.
fn zip(folder: &TempDir, content: &Path, style: &Path, more: &[&str]) -> Output {
    let output = folder.path().join("out.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tronie"));
    command
        .current_dir(root(""))
        .args(["lora", "zip", "--model", "tiny"])
        .args(["--models", "tests/models/models.yaml"]);
    command
        .arg("--content")
        .arg(content)
        .arg("--style")
        .arg(style);
    command.arg("--output").arg(output).args(more);
    if std::env::var_os("ORT_DYLIB_PATH").is_none() {
        command.env("VIRTUAL_ENV", root(".venv"));
    }
    command.output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// f32 or f64 tensors of a file, widened.
fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let widened = file.iter().map(|(name, view)| {
        let values = match view.dtype() {
            safetensors::Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            safetensors::Dtype::F64 => view
                .data()
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            other => panic!("{name} is {other:?}"),
        };
        (name.to_owned(), values)
    });
    widened.collect()
}

fn fit(lora: &Path) -> Fit {
    let open = |key: &str, file: &str| {
        let file = root("tests/models/tiny").join(key).join(file);
        Weights::open(&[ModelFile::from(file.as_path())]).unwrap()
    };
    let unet = open("unet", "diffusion_pytorch_model.safetensors");
    let text = open("text_encoder", "model.safetensors");
    let targets = [("unet", &unet), ("text_encoder", &text)];
    let targets = targets.map(|(key, weights)| (key.to_owned(), weights));
    let file = LoraFile::open(&ModelFile::from(lora)).unwrap();
    file.fit(&BTreeMap::from(targets))
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

#[test]
fn a_layers_mergers_are_numpys() {
    let (content, style) = (fit(&golden("content")), fit(&golden("style")));
    let pair = Pair::of(&content, &style).unwrap();
    let golden = tensors(&golden("closed"));
    let mut compared = 0;
    for (layer, inputs) in pair.layers() {
        let moments = |side: &str| {
            let mean = golden.get(&format!("{layer}.C_{side}"))?;
            let mean = Array2::from_shape_vec((inputs, inputs), mean.clone()).unwrap();
            Some(Moments::of_mean(mean))
        };
        let (Some(seen_c), Some(seen_s)) = (moments("c"), moments("s")) else {
            continue;
        };
        let mergers = pair
            .solve(layer, [&seen_c, &seen_s], Terms::default())
            .unwrap();
        for (found, side) in [(&mergers.content, "c"), (&mergers.style, "s")] {
            let wanted = &golden[&format!("{layer}.m_{side}")];
            let apart = largest_difference(found.as_slice().unwrap(), wanted);
            assert!(apart < 1e-6, "{layer} {side}: {apart}");
        }
        compared += 1;
    }
    assert!(compared >= 10, "{compared} layers have moments");
}

#[test]
fn a_whole_run_has_the_references_mergers_and_keeps_more_than_addition() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("mergers.safetensors");
    let save = [
        "--save-mergers",
        saved.to_str().unwrap(),
        "--measure",
        "--json",
    ];
    let more = [&PROMPTS[..], &PICTURES, &save].concat();
    let report = json(&zip(&folder, &golden("content"), &golden("style"), &more));
    let (found, wanted) = (tensors(&saved), tensors(&golden("closed")));
    let mut layers = 0;
    for (name, wanted) in &wanted {
        let Some((layer, place)) = [(".m_c", 1), (".m_s", 2)]
            .iter()
            .find_map(|(end, place)| Some((name.strip_suffix(end)?, place)))
        else {
            continue;
        };
        let found = &found[&format!("unet.{layer}.lora.merger_{place}")];
        // Activations differ as diffusers' and this engine's f32 do.
        let apart = largest_difference(found, wanted);
        assert!(apart < 1e-3, "{name}: {apart}");
        layers += 1;
    }
    assert_eq!(report["zipped"], layers / 2);
    assert_eq!(report["added"], 4);
    let lost = |side: &str, how: &str| report["lost"][side][how].as_f64().unwrap();
    let sum = |how: &str| lost("content", how) + lost("style", how);
    assert!(
        lost("content", "zipped") < lost("content", "added"),
        "{report}"
    );
    assert!(lost("style", "zipped") < lost("style", "added"), "{report}");
    assert!(sum("zipped") < 0.8 * sum("added"), "{report}");
}

#[test]
fn mergers_of_either_kind_of_file_give_the_merge_again() {
    let folder = tempfile::tempdir().unwrap();
    let (content, style) = (golden("content"), golden("style"));
    let saved = folder.path().join("mergers.safetensors");
    let more = [
        &PROMPTS[..],
        &PICTURES,
        &["--save-mergers", saved.to_str().unwrap(), "--json"],
    ];
    json(&zip(&folder, &content, &style, &more.concat()));
    let out = folder.path().join("out.safetensors");
    let first = std::fs::read(&out).unwrap();
    json(&zip(
        &folder,
        &content,
        &style,
        &["--mergers", saved.to_str().unwrap(), "--json"],
    ));
    // What is saved is rounded to f32, which is what the columns are scaled by only nearly.
    let again = tensors(&out);
    let whole = folder.path().join("whole.safetensors");
    std::fs::write(&whole, &first).unwrap();
    for (name, values) in tensors(&whole) {
        let apart = largest_difference(&values, &again[&name]);
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    // As ziplora-pytorch saves it: the merged update of every layer.
    let fits = (fit(&content), fit(&style));
    let pair = Pair::of(&fits.0, &fits.1).unwrap();
    let merged = fit(&out);
    let updates = pair.layers().map(|(layer, _)| {
        let weight = format!("{layer}.weight");
        let matched = merged.matched.iter().find(|m| m.tensor == weight).unwrap();
        let factors = matched.low_rank().unwrap().unwrap();
        (layer, factors.up.dot(&factors.down))
    });
    let updates = updates.collect::<Vec<_>>();
    let bytes = updates.iter().map(|(layer, update)| {
        let values = update.iter().copied().collect::<Vec<_>>();
        (
            format!("unet.unet.{layer}.lora.weight"),
            update.dim(),
            f32_bytes(&values),
        )
    });
    let bytes = bytes.collect::<Vec<_>>();
    let shapes = bytes
        .iter()
        .map(|(_, (rows, columns), _)| [*rows, *columns]);
    let shapes = shapes.collect::<Vec<_>>();
    let entries = bytes.iter().zip(&shapes);
    let entries =
        entries.map(|((name, _, bytes), shape)| (name.as_str(), "F32", &shape[..], &bytes[..]));
    let file = folder.path().join("ziplora.safetensors");
    std::fs::write(&file, well_formed(&entries.collect::<Vec<_>>(), 0)).unwrap();
    let split = Mergers::read(&ModelFile::from(file.as_path()), &pair).unwrap();
    let wanted = tensors(&saved);
    for (layer, mergers) in split {
        let wanted = &wanted[&format!("unet.{layer}.lora.merger_1")];
        let found = mergers.content.as_slice().unwrap();
        let apart = largest_difference(found, wanted);
        assert!(apart < 2e-2, "{layer}: {apart}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (content, style) = (golden("content"), golden("style"));
    let absent = folder.path().join("absent.safetensors");
    let of_another = folder.path().join("other.safetensors");
    let name = "unet.down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q";
    let [down, up] = ["lora_A", "lora_B"].map(|part| format!("{name}.{part}.weight"));
    let values = f32_bytes(&[0.5; 16]);
    let entries = [
        (down.as_str(), "F32", &[1, 16][..], &values[..]),
        (up.as_str(), "F32", &[16, 1], &values),
    ];
    std::fs::write(&of_another, well_formed(&entries, 0)).unwrap();
    let broken = folder.path().join("nan.safetensors");
    let name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
    let [down, up] = ["lora_A", "lora_B"].map(|part| format!("{name}.{part}.weight"));
    let nan = f32_bytes(&[f32::NAN; 16]);
    let entries = [
        (down.as_str(), "F32", &[1, 16][..], &nan[..]),
        (up.as_str(), "F32", &[16, 1], &values),
    ];
    std::fs::write(&broken, well_formed(&entries, 0)).unwrap();
    let empty = ["--prompt-content", " ", "--prompt-style", "ink"];
    let ridge = [&PROMPTS[..], &["--ridge", "0"]].concat();
    let idle = [&["--mergers", content.to_str().unwrap()][..], &PROMPTS].concat();
    let cases: [(&Path, &Path, &[&str], &str); 9] = [
        (&content, &content, &PROMPTS, "is --content too"),
        (&content, &absent, &PROMPTS, "absent.safetensors"),
        (&content, &of_another, &PROMPTS, "name a LoRA of this model"),
        (&content, &broken, &PROMPTS, "finite"),
        (&content, &style, &empty, "prompt-content: is empty"),
        (&content, &style, &ridge, "ridge: must be"),
        (&content, &style, &idle, "nothing is painted"),
        (
            &content,
            &style,
            &["--mergers", style.to_str().unwrap()],
            "neither a merger nor",
        ),
        (
            &content,
            &style,
            &["--prompt-content", "a dog"],
            "--prompt-style",
        ),
    ];
    for (content, style, more, words) in cases {
        let output = zip(&folder, content, style, more);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{words}");
        assert!(message.contains(words), "no {words:?} in: {message}");
        assert!(!message.contains("panicked"), "{message}");
        assert!(!folder.path().join("out.safetensors").exists(), "{words}");
    }
}

#[test]
fn every_attention_layer_of_sdxl_can_be_watched() {
    for (model, layers) in [("graphs/sdxl-base", 70), ("tests/models/graphs/tiny", 16)] {
        for dialect in ["fused", "cuda", "plain"] {
            let path = root(model).join(format!("unet.{dialect}.onnx.gz"));
            let mut graph = Graph::load(path.as_path()).unwrap();
            let own = graph.weights.iter().map(|weight| weight.name.clone());
            let own = own.filter(|name| {
                let ends = [
                    "to_q.weight",
                    "to_k.weight",
                    "to_v.weight",
                    "to_out.0.weight",
                ];
                name.contains(".attn") && ends.iter().any(|end| name.ends_with(end))
            });
            let own = own.collect::<Vec<_>>();
            // Keys and values of the text are of another graph.
            assert_eq!(own.len(), 6 * layers, "{model} {dialect}");
            let before = graph.outputs.len();
            let watched = graph.watch(own.iter().map(String::as_str)).unwrap();
            assert_eq!(watched.len(), own.len());
            // Query, key and value of self-attention see the same.
            assert_eq!(
                graph.outputs.len() - before,
                4 * layers,
                "{model} {dialect}"
            );
            let unknown = graph.watch(["no.such.weight"]);
            assert_eq!(unknown, Err("no.such.weight".to_owned()));
        }
    }
}
