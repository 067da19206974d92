//! `tronie bench` from outside.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::workshop::Workshop;

fn bench(w: &Workshop, arguments: &[&str]) -> Output {
    let common = ["bench", "--steps", "3", "--json"];
    w.tronie(&[&common[..], arguments].concat())
        .output()
        .unwrap()
}

fn measured(w: &Workshop, arguments: &[&str]) -> Value {
    let output = bench(w, arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// All operations of a network in the profiled run.
fn flops(row: &Value, network: &str) -> u64 {
    let operators = row["measured"]["operators"].as_array().unwrap();
    let of_network = operators.iter().filter(|o| o["network"] == network);
    of_network.map(|o| o["flops"].as_u64().unwrap()).sum()
}

/// Whether memory is told here.
const TOLD: bool = cfg!(target_os = "linux");

fn check_row(row: &Value) {
    let measured = &row["measured"];
    for field in [
        "load-seconds",
        "text-seconds",
        "total-seconds",
        "limit-flops-per-second",
    ] {
        assert!(number(&measured[field]) > 0.0, "{field}");
    }
    let decoder = &measured["decoder"];
    for field in ["seconds", "flops", "flops-per-second", "share-of-limit"] {
        assert!(number(&decoder[field]) > 0.0, "{field}");
    }
    let unet = &measured["unets"][0];
    assert_eq!(unet["model"], "tiny");
    assert_eq!(unet["samples"].as_array().unwrap().len(), 2);
    assert_eq!(decoder["samples"], serde_json::json!([decoder["seconds"]]));
    for field in [
        "first-step-seconds",
        "step-seconds",
        "flops",
        "flops-per-second",
        "share-of-limit",
    ] {
        assert!(number(&unet[field]) > 0.0, "{field}");
    }
    let outside = number(&unet["outside-runtime-share"]);
    assert!((0.0..0.5).contains(&outside), "{outside}");
    for field in [
        "peak-anonymous-bytes",
        "denoise-anonymous-bytes",
        "peak-resident-bytes",
    ] {
        assert_eq!(measured[field].as_u64().is_some_and(|b| b > 1 << 20), TOLD);
    }
    assert_eq!(measured["fallen-back"], serde_json::json!([]));
    let stages = measured["stages"].as_array().unwrap();
    let denoise = stages.iter().find(|s| s["stage"] == "denoise").unwrap();
    assert_eq!(denoise["what"], "tiny");
    let memory = [
        &denoise["anonymous-bytes-before"],
        &denoise["anonymous-bytes-peak"],
    ];
    assert!(memory.iter().all(|m| m.is_u64() == TOLD));
    assert!(stages.iter().any(|s| s["what"] == "unet of tiny"));
}

#[test]
fn every_memory_mode_is_measured_and_compared() {
    let w = Workshop::new();
    // Larger than a tile, so that `low` decodes in tiles.
    let json = measured(&w, &["--model", "tiny", "--size", "200x136"]);
    let rows = json["rows"].as_array().unwrap();
    let modes = rows.iter().map(|r| r["memory"].as_str().unwrap());
    assert!(modes.eq(["low", "balanced", "fast"]));
    rows.iter().for_each(check_row);
    assert_eq!(json["reference"]["memory"], "low");
    assert_eq!(json["request"]["width"], 200);
    assert!(Path::new(json["library"].as_str().unwrap()).exists());
    // The reference equals itself; without tiles the picture is close, and the other modes are closer to each other.
    assert_eq!(rows[0]["difference"]["psnr-db"], Value::Null);
    assert_eq!(rows[0]["difference"]["largest-level"], 0);
    for row in &rows[1..] {
        let psnr = number(&row["difference"]["psnr-db"]);
        assert!((15.0..60.0).contains(&psnr), "{psnr}");
    }
    // The work is the mathematics', whatever the layout; tiles overlap.
    let work = |row: &Value| flops(row, "unet of tiny");
    assert!(rows.iter().all(|r| work(r) == work(&rows[0])));
    let decoding = |row: &Value| flops(row, "vae_decoder of tiny");
    assert_eq!(decoding(&rows[1]), decoding(&rows[2]));
    assert!(decoding(&rows[0]) > decoding(&rows[1]));
    assert!(w.made_files().is_empty());
}

#[test]
fn work_is_what_torch_counts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = std::fs::read(root.join("tests/golden/flops.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let of = |name: &str| golden[name].as_u64().unwrap();
    let w = Workshop::new();
    let size = format!("{}x{}", of("width"), of("height"));
    let size = ["--size", size.as_str(), "--guidance", "1"];
    let modes = ["--model", "tiny", "--memory", "balanced,fast"];
    let json = measured(&w, &[&size[..], &modes].concat());
    for row in json["rows"].as_array().unwrap() {
        let network = flops(row, "unet of tiny");
        assert_eq!(row["measured"]["unets"][0]["flops"], network);
        assert_eq!(network + flops(row, "kv of tiny"), of("unet"));
        // Upsampling convolutions are four of 2x2 instead of one of 3x3 over four times the area.
        let saved = of("decoder_upsampling") / 9 * 5;
        assert_eq!(row["measured"]["decoder"]["flops"], of("decoder") - saved);
    }
}

#[test]
fn a_refiner_has_its_own_times() {
    let w = Workshop::new();
    let pair = ["--model", "tiny", "--refiner", "tiny-refiner"];
    let rest = ["--memory", "fast", "--runs", "2", "--refine-at", "0.4"];
    let json = measured(&w, &[&pair[..], &rest].concat());
    let unets = json["rows"][0]["measured"]["unets"].as_array().unwrap();
    let steps = |unet: &Value| unet["samples"].as_array().unwrap().len();
    let models = unets
        .iter()
        .map(|u| (u["model"].as_str().unwrap(), steps(u)));
    // One step of the base and two of the refiner, twice, without each first.
    let expected = [("tiny", 0), ("tiny-refiner", 2)];
    assert!(models.eq(expected), "{unets:?}");
    assert_eq!(unets[0]["step-seconds"], Value::Null);
    assert!(number(&unets[1]["step-seconds"]) > 0.0);
    assert_ne!(unets[0]["flops"], unets[1]["flops"]);
}

#[test]
fn what_is_not_available_is_a_row_with_its_reason() {
    let w = Workshop::new();
    let both = ["--model", "tiny", "--provider", "coreml,cpu"];
    let json = measured(&w, &[&both[..], &["--memory", "balanced"]].concat());
    if cfg!(target_os = "macos") {
        return;
    }
    let row = &json["rows"][0];
    assert_eq!(row["provider"], "coreml");
    assert_eq!(row["measured"], Value::Null);
    let reason = row["reason"].as_str().unwrap();
    assert!(reason.contains("coreml is not available"), "{reason}");
    check_row(&json["rows"][1]);
    let only = bench(&w, &["--model", "tiny", "--provider", "coreml"]);
    assert_eq!(only.status.code(), Some(5));
    let json: Value = serde_json::from_slice(&only.stdout).unwrap();
    assert_eq!(json["rows"][0]["memory"], "balanced");
    assert_eq!(json["reference"], Value::Null);
}

#[test]
fn times_alone_come_without_work() {
    let w = Workshop::new();
    let arguments = ["--model", "tiny", "--memory", "low", "--times-only"];
    let json = measured(&w, &arguments);
    let measured = &json["rows"][0]["measured"];
    assert!(number(&measured["unets"][0]["step-seconds"]) > 0.0);
    assert_eq!(measured["unets"][0]["flops"], Value::Null);
    assert_eq!(measured["limit-flops-per-second"], Value::Null);
    assert_eq!(measured["operators"], serde_json::json!([]));
}

#[test]
fn the_table_has_a_line_a_configuration() {
    let w = Workshop::new();
    let arguments = ["bench", "--model", "tiny", "--memory", "low,fast"];
    let output = w
        .tronie(&[&arguments[..], &["--steps", "2", "--operators"]].concat())
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    for part in [
        "tiny, 128x128 px, 2 steps",
        "provider  memory",
        "cpu       low",
        "cpu       fast",
        "of the limit of",
        "unet of tiny",
        "equal",
    ] {
        assert!(table.contains(part), "no {part:?} in: {table}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_runs() {
    let w = Workshop::new();
    let cases: [(&[&str], &[&str]); 6] = [
        (
            &["--model", "nobody"],
            &["model", "`nobody`", "tiny-refiner"],
        ),
        (
            &["--model", "tiny", "--provider", "abacus"],
            &["abacus", "cuda"],
        ),
        (
            &["--model", "tiny", "--memory", "tiny"],
            &["tiny", "balanced"],
        ),
        (&["--model", "tiny", "--size", "100x100"], &["width", "8"]),
        (&["--model", "tiny", "--steps", "0"], &["steps"]),
        (&["--model", "tiny", "--runs", "0"], &["runs"]),
    ];
    for (arguments, parts) in cases {
        let output = w.tronie(&[&["bench"], arguments].concat()).output();
        let output = output.unwrap();
        w.assert_fails(&output, 2, parts);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("measuring"));
    }
}

#[test]
fn a_model_whose_weights_are_missing_fails_with_its_reason() {
    let w = Workshop::new();
    std::fs::remove_file(w.path("tiny/vae/diffusion_pytorch_model.safetensors")).unwrap();
    let output = bench(&w, &["--model", "tiny", "--memory", "low"]);
    assert_eq!(output.status.code(), Some(4));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let reason = json["rows"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("vae"), "{reason}");
}
