//! LoRAs on the command line: what they do, what is told of them, overlays of them, what is refused.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::workshop::Workshop;

const KOHYA: &str = "loras/tiny-kohya.safetensors";
const PEFT: &str = "loras/tiny-peft.safetensors";

/// A workshop with the golden runs' LoRAs for the tiny model.
fn studio() -> Workshop {
    let w = Workshop::new();
    std::fs::create_dir(w.path("loras")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
    for file in [KOHYA, PEFT] {
        std::fs::copy(golden.join(file), w.path(file)).unwrap();
    }
    w
}

/// The picture that LoRAs and other arguments lead to, and what was said.
fn paint(w: &Workshop, loras: &[&str], more: &[&str]) -> (Vec<u8>, String) {
    let flags = loras.iter().flat_map(|lora| ["--lora", *lora]);
    let flags = flags
        .chain(more.iter().copied())
        .chain(["--output", "o.png"]);
    let output = w.generate(&flags.collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    (levels(w, "o.png"), said)
}

fn painted(w: &Workshop, loras: &[&str]) -> Vec<u8> {
    paint(w, loras, &["--memory", "balanced"]).0
}

fn levels(w: &Workshop, name: &str) -> Vec<u8> {
    image::open(w.path(name)).unwrap().to_rgb8().into_raw()
}

fn run(w: &Workshop, arguments: &[&str]) -> String {
    let output = w.tronie(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

fn merge(w: &Workshop, loras: &[&str], more: &[&str]) -> serde_json::Value {
    let flags = loras.iter().flat_map(|lora| ["--lora", *lora]);
    let fixed = ["lora", "merge", "--model", "tiny", "--json"];
    let all: Vec<_> = fixed
        .into_iter()
        .chain(flags)
        .chain(more.iter().copied())
        .collect();
    serde_json::from_str(&run(w, &all)).unwrap()
}

/// A LoRA with a module that no model has.
fn with_a_stray_module(w: &Workshop) -> &'static str {
    let to = "loras/more.safetensors";
    let bytes = std::fs::read(w.path(PEFT)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let zeros = [0; 64];
    let mut tensors = file.tensors();
    for (factor, shape) in [("A", vec![1, 16]), ("B", vec![16, 1])] {
        let view = TensorView::new(safetensors::Dtype::F32, shape, &zeros).unwrap();
        tensors.push((format!("unet.nowhere.to_q.lora_{factor}.weight"), view));
    }
    let written = safetensors::serialize(tensors, header.metadata().clone()).unwrap();
    std::fs::write(w.path(to), written).unwrap();
    to
}

#[test]
fn a_scale_of_zero_is_no_lora_bit_for_bit() {
    let w = studio();
    let without = painted(&w, &[]);
    let off = format!("{KOHYA}@0");
    assert!(painted(&w, &[&off]) == without);
    assert!(painted(&w, &[&off, PEFT]) == painted(&w, &[PEFT]));
    assert!(painted(&w, &[KOHYA]) != without);
    assert!(painted(&w, &[&format!("{KOHYA}@0:te=1")]) != without);
    // This one has nothing for the text encoders.
    assert!(painted(&w, &[&format!("{PEFT}@0:te=1")]) == without);
}

#[test]
fn scales_of_text_encoders_count_by_themselves() {
    let w = studio();
    let of = |scales: &str| painted(&w, &[&format!("{KOHYA}@{scales}")]);
    assert!(of("0.8") == of("0.8:te=0.8"));
    assert!(of("0.8") != of("0.8:te=0.3"));
    let unet_only = of("0.8:te=0");
    assert!(unet_only != of("0.8:te=0.3") && unet_only != painted(&w, &[]));
}

#[test]
fn the_order_of_loras_does_not_matter_and_each_counts() {
    let w = studio();
    let (a, b) = (format!("{KOHYA}@0.8"), format!("{PEFT}@-0.6"));
    let apart = |one: &[u8], other: &[u8]| one.iter().zip(other).map(|(a, b)| a.abs_diff(*b)).max();
    let both = painted(&w, &[&a, &b]);
    assert!(apart(&both, &painted(&w, &[&b, &a])) <= Some(1));
    assert!(both != painted(&w, &[&a]) && both != painted(&w, &[&b]));
    let halves = format!("{KOHYA}@0.4");
    assert!(apart(&painted(&w, &[&halves, &halves]), &painted(&w, &[&a])) <= Some(1));
}

#[test]
fn every_memory_mode_paints_the_same_within_a_level() {
    let w = studio();
    let [low, balanced, fast] = ["low", "balanced", "fast"].map(|mode| {
        let flags = ["--memory", mode, "--vae-tiling", "off"];
        paint(&w, &[KOHYA, PEFT], &flags).0
    });
    for other in [low, fast] {
        assert!(
            balanced
                .iter()
                .zip(&other)
                .all(|(a, b)| a.abs_diff(*b) <= 1)
        );
    }
}

#[test]
fn a_picture_with_loras_repeats_itself_and_goes_on_from_its_latents() {
    let w = studio();
    let loras = [&format!("{KOHYA}@0.8:te=0.5"), PEFT];
    let refined = ["--refiner", "tiny-refiner", "--refine-at", "0.5"];
    let (whole, _) = paint(&w, &loras, &refined);
    std::fs::rename(w.path("o.png"), w.path("first.png")).unwrap();
    run(
        &w,
        &[
            "generate",
            "--request",
            "first.png",
            "--output",
            "again.png",
        ],
    );
    assert!(levels(&w, "again.png") == whole);
    let request: serde_json::Value =
        serde_json::from_str(&run(&w, &["inspect", "first.png"])).unwrap();
    assert_eq!(request["loras"][0]["te-scale"], 0.5);
    assert_eq!(request["loras"][1]["lora"], PEFT);
    let stop = ["--stop-at", "1", "--latents-out", "l.safetensors"];
    let flags = loras.iter().flat_map(|lora| ["--lora", *lora]);
    let flags: Vec<_> = flags.chain(refined).chain(stop).collect();
    assert!(w.generate(&flags).status.success());
    let on = [
        "generate",
        "--latents-in",
        "l.safetensors",
        "--output",
        "on.png",
    ];
    run(&w, &on);
    assert!(levels(&w, "on.png") == whole);
    for name in ["o.png", "first.png", "again.png", "on.png"] {
        let _ = std::fs::remove_file(w.path(name));
    }
    let other = [&on[..], &["--lora", PEFT]].concat();
    let output = w.tronie(&other).output().unwrap();
    w.assert_fails(&output, 2, &["`loras` cannot change"]);
}

#[test]
fn modules_that_do_not_fit_are_refused_or_told() {
    let w = studio();
    let more = with_a_stray_module(&w);
    let output = w.generate(&["--lora", more]);
    let parts = [
        "more.safetensors",
        "unet.nowhere.to_q",
        "tiny",
        "--lora-lenient",
    ];
    w.assert_fails(&output, 4, &parts);
    let fitting = painted(&w, &[PEFT]);
    let flags = ["--lora-lenient", "--memory", "balanced"];
    let (lenient, said) = paint(&w, &[more], &flags);
    assert!(lenient == fitting);
    assert!(
        said.contains("warning: ") && said.contains("unet.nowhere.to_q"),
        "{said}"
    );
}

#[test]
fn files_that_are_no_loras_are_refused_before_a_network_is_loaded() {
    let w = studio();
    std::fs::write(w.path("text.safetensors"), "no weights").unwrap();
    let bytes = std::fs::read(w.path(KOHYA)).unwrap();
    std::fs::write(w.path("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    for (lora, code, parts) in [
        (
            "none.safetensors",
            4,
            &["none.safetensors", "is missing", "name a .safetensors file"][..],
        ),
        ("text.safetensors", 4, &["text.safetensors"]),
        ("cut.safetensors", 4, &["cut.safetensors"]),
        (
            "tiny/unet/diffusion_pytorch_model.safetensors",
            4,
            &["UNet"],
        ),
        ("loras", 4, &["loras"]),
        (
            "loras/tiny-kohya.safetensors@much",
            2,
            &["`much` is no scale"],
        ),
    ] {
        let output = w.generate(&["--lora", lora]);
        w.assert_fails(&output, code, parts);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("loading"), "{said}");
    }
}

#[test]
fn the_report_tells_modules_shares_and_training() {
    let w = studio();
    let text = run(&w, &["lora", KOHYA, "--model", "tiny"]);
    for part in [
        "kohya",
        "rank 2",
        "alpha 1",
        "text_encoder_2",
        "unet",
        "networks.lora",
        "words           sks tronie, a sailor, oil on panel",
        "sd_xl_base_1.0.safetensors",
        "images          40",
        "tiny-kohya",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    let json = run(&w, &["lora", KOHYA, "--model", "tiny", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let unet = &json["components"]["unet"];
    let count = |key: &str| unet[key].as_u64().unwrap();
    assert!(count("parameters") > 0 && count("parameters") < count("of"));
    let changes = json["changes"].as_array().unwrap();
    let of_unet = changes.iter().filter(|c| c["component"] == "unet");
    assert_eq!(of_unet.clone().count() as u64, count("modules"));
    let sum: f64 = of_unet.map(|c| c["change"].as_f64().unwrap().powi(2)).sum();
    assert!((sum.sqrt() - unet["change"].as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(json["unmatched"], serde_json::json!({}));
    let more = with_a_stray_module(&w);
    let text = run(&w, &["lora", more, "--model", "tiny"]);
    assert!(
        text.contains("do not fit tiny") && text.contains("nowhere"),
        "{text}"
    );
}

#[test]
fn an_overlay_is_its_loras_bit_for_bit_and_tells_what_it_is() {
    let w = studio();
    let loras = [&format!("{KOHYA}@0.8:te=0.5"), &format!("{PEFT}@-0.3")[..]];
    let merged = merge(&w, &loras, &["--output", "o.safetensors"]);
    assert!(merged["tensors"]["unet"].as_u64() > merged["tensors"]["text_encoder"].as_u64());
    assert!(painted(&w, &["o.safetensors"]) == painted(&w, &loras));
    assert!(painted(&w, &["o.safetensors@0"]) == painted(&w, &[]));
    let report = run(&w, &["lora", "o.safetensors", "--model", "tiny"]);
    assert!(report.contains("overlay"), "{report}");
    let bytes = std::fs::read(w.path("o.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let known = ["unet.", "text_encoder.", "text_encoder_2."];
    for (name, view) in file.tensors() {
        assert!(
            known.iter().any(|component| name.starts_with(component)),
            "{name}"
        );
        assert_eq!(view.dtype(), safetensors::Dtype::F32);
    }
    merge(
        &w,
        &loras,
        &["--output", "half.safetensors", "--dtype", "f16"],
    );
    let whole = std::fs::metadata(w.path("o.safetensors")).unwrap().len();
    assert!(std::fs::metadata(w.path("half.safetensors")).unwrap().len() < whole * 2 / 3);
    let (half, full) = (painted(&w, &["half.safetensors"]), painted(&w, &loras));
    let apart = half
        .iter()
        .zip(&full)
        .filter(|(a, b)| a.abs_diff(**b) > 8)
        .count();
    assert!(apart < full.len() / 100, "{apart}");
}

#[test]
fn an_overlay_is_refused_on_another_base_with_a_scale_and_with_another_overlay() {
    let w = studio();
    merge(&w, &[PEFT], &["--output", "loras/o.safetensors"]);
    let fails = |loras: &[&str], code, parts: &[&str]| {
        let flags: Vec<_> = loras.iter().flat_map(|lora| ["--lora", *lora]).collect();
        w.assert_fails(&w.generate(&flags), code, parts);
    };
    fails(
        &["loras/o.safetensors@0.5"],
        2,
        &["overlay", "its own is 1"],
    );
    fails(
        &["loras/o.safetensors", "loras/o.safetensors"],
        2,
        &["second overlay"],
    );
    // The LoRA on top of the overlay is the same as both at once.
    let both = painted(&w, &[PEFT, KOHYA]);
    assert!(painted(&w, &["loras/o.safetensors", KOHYA]) == both);
    std::fs::remove_file(w.path("o.png")).unwrap();
    let unet = "tiny/unet/diffusion_pytorch_model.safetensors";
    let mut bytes = std::fs::read(w.path(unet)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(w.path(unet), bytes).unwrap();
    fails(
        &["loras/o.safetensors"],
        4,
        &["overlay of another unet", "tiny"],
    );
}

#[test]
fn a_merge_that_cannot_be_done_leaves_nothing() {
    let w = studio();
    let off = format!("{PEFT}@0");
    for (loras, target, code, parts) in [
        (&off[..], "x.out.safetensors", 2, &["nothing to merge"][..]),
        (
            "none.safetensors",
            "x.out.safetensors",
            4,
            &["none.safetensors"],
        ),
        (PEFT, "loras", 7, &["loras", "folder"]),
    ] {
        let arguments = [
            "lora", "merge", "--model", "tiny", "--lora", loras, "--output", target,
        ];
        let output = w.tronie(&arguments).output().unwrap();
        w.assert_fails(&output, code, parts);
    }
    let output = w.tronie(&["lora", "--model", "tiny"]).output().unwrap();
    w.assert_fails(&output, 2, &["FILE"]);
}

#[test]
fn a_lora_has_a_name_in_the_catalogue() {
    let w = studio();
    let mut text = std::fs::read_to_string(w.path("models.yaml")).unwrap();
    let entry = format!("  tiny-sailor:\n    family: sdxl\n    file: {KOHYA}\n");
    match text.find("\nloras:\n") {
        Some(at) => text.insert_str(at + "\nloras:\n".len(), &entry),
        None => text = format!("{text}\nloras:\n{entry}"),
    }
    std::fs::write(w.path("models.yaml"), text).unwrap();
    assert!(painted(&w, &["tiny-sailor@0.7"]) == painted(&w, &[&format!("{KOHYA}@0.7")]));
    std::fs::remove_file(w.path("o.png")).unwrap();
    let output = w.generate(&["--lora", "tiny-sailer"]);
    w.assert_fails(&output, 4, &["tiny-sailer", "`tiny-sailor`"]);
}
