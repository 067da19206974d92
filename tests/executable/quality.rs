//! `tronie bench --quality` with the tiny model and a judge of random weights: the mechanics, not the figures.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::workshop::Workshop;

const LORA: &str = "loras/tiny-peft.safetensors";
const QUESTIONS: &str = "judge/quality.json";

fn studio() -> Workshop {
    let w = Workshop::new();
    std::fs::create_dir(w.path("loras")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
    std::fs::copy(golden.join(LORA), w.path(LORA)).unwrap();
    w
}

fn quality(w: &Workshop, more: &[&str]) -> Output {
    let fixed = ["bench", "--model", "tiny", "--steps", "2"];
    let folder: &[&str] = if more.contains(&"--quality") {
        &[]
    } else {
        &["--quality", "judge"]
    };
    let arguments = [&fixed[..], folder, more].concat();
    w.tronie(&arguments).output().unwrap()
}

fn measures(output: &Output) -> Vec<Value> {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["model"], "tiny");
    json["measures"].as_array().unwrap().clone()
}

#[test]
fn every_kind_of_question_is_painted_and_judged() {
    let measures = measures(&quality(&studio(), &["--json"]));
    let told = |subject: &str| {
        let own = measures.iter().filter(|m| m["subject"] == subject);
        own.map(|m| (m["what"].as_str().unwrap(), m["count"].as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    let attributes = [("hair", 3), ("style", 1), ("glasses", 1)];
    assert_eq!(told("text"), attributes);
    assert_eq!(told("identity"), [("identity, nearest of 2", 2)]);
    assert_eq!(told("style"), [("style", 1)]);
    let both = [("identity, nearest of 2", 1), ("style", 1)];
    assert_eq!(told("both"), both);
    assert_eq!(told("refiner").len(), 6);
    assert_eq!(told("lightning").len(), 3);
    assert_eq!(told("lora"), [("style", 1)]);
    for measure in &measures {
        let value = measure["value"].as_f64().unwrap();
        assert!(value.is_finite(), "{measure}");
        let met = measure["bar"].as_object().map(|bar| {
            let least = bar.get("at-least").and_then(Value::as_f64);
            let most = bar.get("at-most").and_then(Value::as_f64);
            least.is_none_or(|b| value >= b) && most.is_none_or(|b| value <= b)
        });
        assert_eq!(measure["met"].as_bool(), met, "{measure}");
    }
}

#[test]
fn some_questions_can_be_chosen_and_a_missed_bar_is_no_error() {
    let some = ["--quality-only", "text,identity", "--quality-count", "1"];
    let output = quality(&studio(), &some);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{table}");
    assert!(
        table.contains("hair") && !table.contains("refiner"),
        "{table}"
    );
    assert!(
        !table.contains("glasses"),
        "the first prompt has none: {table}"
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("identity: 1 pictures"), "{said}");
}

#[test]
fn what_is_wrong_with_a_folder_is_said() {
    let w = studio();
    w.assert_fails(
        &quality(&w, &["--quality", "nowhere"]),
        4,
        &["quality.json", "judge"],
    );
    w.assert_fails(
        &quality(&w, &["--quality-only", "smell"]),
        2,
        &["smell", "text, identity"],
    );
    w.assert_fails(&quality(&w, &["--quality-count", "0"]), 2, &["at least 1"]);
    w.assert_fails(&quality(&w, &["--runs", "2"]), 2, &["--runs", "--quality"]);

    let text = std::fs::read_to_string(w.path(QUESTIONS)).unwrap();
    let spoilt = |from: &str, to: &str, parts: &[&str]| {
        assert!(text.contains(from), "{from}");
        std::fs::write(w.path(QUESTIONS), text.replacen(from, to, 1)).unwrap();
        let code = if parts[0] == "tensor" { 4 } else { 3 };
        w.assert_fails(&quality(&w, &["--quality-only", "text"]), code, &parts[1..]);
        std::fs::write(w.path(QUESTIONS), &text).unwrap();
    };
    let of_file = |parts: &[&'static str]| [&["file", QUESTIONS], parts].concat();
    spoilt(
        "\"hair\": \"bun\"",
        "\"hair\": \"bum\"",
        &of_file(&["`bum`", "bald, bun, long"]),
    );
    spoilt(
        "\"person\": 1",
        "\"person\": 7",
        &of_file(&["both[0].person", "7 of 2"]),
    );
    spoilt("\"p0-1.png\"", "\"p9.png\"", &of_file(&["p9.png"]));
    spoilt("\"prompts\"", "\"promts\"", &of_file(&["promts"]));
    spoilt(
        "\"none\",",
        "\"none\", \"blue\",",
        &["tensor", "logits", "8]", "7]"],
    );
}
