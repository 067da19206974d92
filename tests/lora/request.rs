//! LoRAs in requests and in the catalogue: text form, JSON, and what an entry gives a request.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::float_cmp, reason = "numbers that are carried, not computed")]

use std::path::Path;

use proptest::prelude::*;
use tronie::error::Error;
use tronie::manifest::Catalogue;
use tronie::request::{LoraUse, Request, Resolved};

fn parsed(text: &str) -> LoraUse {
    text.parse().unwrap()
}

fn lora(lora: &str, scale: f64, te_scale: Option<f64>) -> LoraUse {
    let lora = lora.to_owned();
    LoraUse {
        lora,
        scale,
        te_scale,
    }
}

/// That a message has all of `parts`.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn the_text_form_has_every_part() {
    for (text, expected) in [
        ("a.safetensors", lora("a.safetensors", 1.0, None)),
        ("a@0.8", lora("a", 0.8, None)),
        ("a@-1.5e-1", lora("a", -0.15, None)),
        ("a:te=0.5", lora("a", 1.0, Some(0.5))),
        ("a@0.8:te=0", lora("a", 0.8, Some(0.0))),
        (
            "C:\\b c\\a=b.safetensors",
            lora("C:\\b c\\a=b.safetensors", 1.0, None),
        ),
        ("x@y@2", lora("x@y", 2.0, None)),
        ("x:te=1@2:te=3", lora("x:te=1", 2.0, Some(3.0))),
    ] {
        assert_eq!(parsed(text), expected, "{text}");
        assert_eq!(parsed(&expected.to_string()), expected, "{text}");
    }
    assert_eq!(lora("a", 1.0, None).to_string(), "a");
    assert_eq!(lora("a@b", 1.0, None).to_string(), "a@b@1");
}

#[test]
fn what_is_wrong_with_a_text_form_is_said() {
    for (text, parts) in [
        ("", &["`` names no file", "FILE[@SCALE][:te=SCALE]"][..]),
        ("@1", &["`@1` names no file"]),
        (":te=1", &["`:te=1` names no file"]),
        ("a@", &["`` is no scale", "FILE[@SCALE][:te=SCALE]"]),
        ("a@nan", &["`nan` is no scale", "finite"]),
        ("a@-inf", &["`-inf` is no scale"]),
        ("a@1e999", &["`1e999` is no scale"]),
        ("a@b.safetensors", &["`b.safetensors` is no scale", "@1"]),
        ("a:te=x", &["`x` is no scale"]),
        ("a@1:te=", &["`` is no scale"]),
        ("a@1:te=inf", &["`inf` is no scale"]),
        ("a:te=1@", &["`` is no scale"]),
    ] {
        assert_says(&text.parse::<LoraUse>().unwrap_err(), parts);
    }
}

#[test]
fn json_has_the_same_parts() {
    let read = |lora: &str| {
        let text = format!(r#"{{"prompt": "x", "lora-lenient": true, "loras": [{lora}]}}"#);
        Request::from_json(&text, Path::new("r.json"))
    };
    let request = read(r#"{"lora": "a"}, {"lora": "b@", "scale": -2, "te-scale": 0.5}"#).unwrap();
    let expected = vec![lora("a", 1.0, None), lora("b@", -2.0, Some(0.5))];
    assert_eq!(request.loras, Some(expected));
    assert_eq!(request.lora_lenient, Some(true));
    let written = serde_json::to_string(&request).unwrap();
    assert_eq!(
        Request::from_json(&written, Path::new("r.json")).unwrap(),
        request
    );
    for (lora, parts) in [
        (r#"{"scale": 1}"#, &["missing field `lora`"][..]),
        (
            r#"{"lora": "a", "weight": 1}"#,
            &["unknown field `weight`", "`te-scale`"],
        ),
        (r#"{"lora": "a", "scale": 1e999}"#, &["number out of range"]),
        (r#"{"lora": "a", "scale": "1"}"#, &["invalid type"]),
        (r#""a""#, &["struct LoraUse"]),
    ] {
        assert_says(&read(lora).unwrap_err().to_string(), parts);
    }
}

proptest! {
    #[test]
    fn the_text_form_comes_back(
        file in "[a-zA-Z0-9@:=./\\\\ te-]{1,20}",
        scale in -1e3..1e3_f64,
        te_scale in proptest::option::of(-1e3..1e3_f64),
        plain in any::<bool>(),
    ) {
        let scale = if plain { 1.0 } else { scale };
        let used = LoraUse { lora: file, scale, te_scale };
        prop_assert_eq!(parsed(&used.to_string()), used.clone());
        let json = serde_json::to_string(&used).unwrap();
        prop_assert_eq!(serde_json::from_str::<LoraUse>(&json).unwrap(), used);
    }
}

/// The tiny models' catalogue with LoRAs.
fn catalogue(loras: &str) -> Result<Catalogue, Error> {
    let folder = tempfile::tempdir().unwrap();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/models.yaml");
    let text = std::fs::read_to_string(repository).unwrap();
    let (models, _) = text.split_once("\nloras:\n").unwrap_or((&text, ""));
    let file = folder.path().join("models.yaml");
    std::fs::write(&file, format!("{}\nloras:\n{loras}", models.trim_end())).unwrap();
    Catalogue::load(file)
}

const FAST: &str = "  fast:
    family: sdxl
    file: {repo: a/b, file: fast.safetensors}
    licence: MIT
    scheduler: {timestep_spacing: trailing}
    defaults: {steps: 4, guidance: 0.0, scheduler: dpmpp-2m, width: 64, height: 72}
    distilled_steps: 4
";
const FASTER: &str = "  faster:
    family: sdxl
    file: faster.safetensors
    defaults: {steps: 2}
";

fn resolved(request: Request) -> Result<Resolved, Error> {
    let request = Request {
        prompt: "x".into(),
        model: Some("tiny".into()),
        ..request
    };
    request.resolve(&catalogue(&format!("{FAST}{FASTER}")).unwrap(), 0)
}

fn with(loras: &[&str]) -> Request {
    Request {
        loras: Some(loras.iter().map(|text| parsed(text)).collect()),
        ..Request::default()
    }
}

#[test]
fn an_entrys_defaults_hold_where_the_request_says_nothing() {
    let found = resolved(with(&["fast", "own.safetensors@0.5"])).unwrap();
    assert_eq!(found.steps, 4);
    assert_eq!(found.guidance, 0.0);
    assert_eq!(found.scheduler.to_string(), "dpmpp-2m");
    assert_eq!((found.size.width, found.size.height), (64, 72));
    assert_eq!(
        found
            .scheduler_config
            .settings()
            .find(|(key, _)| *key == "timestep_spacing")
            .unwrap()
            .1
            .to_string(),
        "\"trailing\""
    );
    assert_eq!(found.distilled, [("fast".to_owned(), 4)]);
    let said = Request {
        steps: Some(7),
        guidance: Some(2.0),
        ..with(&["fast"])
    };
    let found = resolved(said).unwrap();
    assert_eq!(
        (found.steps, found.guidance, found.size.width),
        (7, 2.0, 64)
    );
}

#[test]
fn a_lora_that_is_off_gives_nothing() {
    let off = resolved(with(&["fast@0", "./fast"])).unwrap();
    let without = resolved(Request::default()).unwrap();
    assert_eq!((off.steps, off.size), (without.steps, without.size));
    assert_eq!(off.scheduler_config, without.scheduler_config);
    assert!(off.distilled.is_empty());
    assert_eq!(
        off.loras()
            .map(|lora| lora.lora.as_str())
            .collect::<Vec<_>>(),
        ["./fast"]
    );
    // It changes the text encoders.
    assert_eq!(resolved(with(&["fast@0:te=1"])).unwrap().steps, 4);
}

#[test]
fn loras_that_disagree_leave_the_choice_to_the_request() {
    let error = resolved(with(&["fast", "faster"])).unwrap_err().to_string();
    assert_says(
        &error,
        &[
            "lora",
            "`fast` wants steps 4, `faster` 2",
            "say it in the request",
        ],
    );
    let said = Request {
        steps: Some(3),
        ..with(&["fast", "faster"])
    };
    assert_eq!(resolved(said).unwrap().steps, 3);
}

#[test]
fn scales_beyond_f32_are_refused() {
    for text in ["a@1e300", "a:te=-1e300"] {
        let error = resolved(with(&[text])).unwrap_err().to_string();
        assert_says(&error, &["lora", "`a`", "is no finite number"]);
    }
    let nameless = Request {
        loras: Some(vec![lora("", 1.0, None)]),
        ..Request::default()
    };
    assert_says(
        &resolved(nameless).unwrap_err().to_string(),
        &["names no file"],
    );
}

#[test]
fn what_is_wrong_with_an_entry_is_said() {
    for (from, to, parts) in [
        (
            "family: sdxl",
            "family: sd15",
            &["unknown variant `sd15`", "sdxl"][..],
        ),
        ("licence", "license", &["unknown field `license`"]),
        (
            "timestep_spacing",
            "timestep_spaces",
            &["loras.fast", "scheduler.timestep_spaces"],
        ),
        ("repo: a/b", "repo: a", &["loras.fast: file", "owner/name"]),
        (
            "steps: 4, g",
            "steps: 0, g",
            &["loras.fast: defaults.steps"],
        ),
        (
            "guidance: 0.0",
            "guidance: .nan",
            &["loras.fast: defaults.guidance"],
        ),
        (
            "distilled_steps: 4",
            "distilled_steps: 0",
            &["loras.fast: distilled_steps"],
        ),
        ("steps: 4, g", "stepz: 4, g", &["unknown field `stepz`"]),
        ("  fast:", "  'fa@st':", &["loras.fa@st", "`@`"]),
    ] {
        assert!(FAST.contains(from), "{from}");
        let error = catalogue(&FAST.replace(from, to)).unwrap_err();
        assert_says(&error.to_string(), parts);
    }
}
