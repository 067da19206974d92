//! What the executable does with bad input: one clear message, the right exit status, no panic, no file.

use crate::workshop::Workshop;

const UNET: &str = "tiny/unet/diffusion_pytorch_model.safetensors";

#[test]
fn an_unknown_model_is_named_with_the_known_ones() {
    let w = Workshop::new();
    let output = w
        .tronie(&["generate", "x", "--model", "nobody"])
        .output()
        .unwrap();
    w.assert_fails(&output, 2, &["model", "`nobody`", "tiny, tiny-refiner"]);
}

#[test]
fn without_a_model_the_base_models_are_listed() {
    let w = Workshop::new();
    w.edit_catalogue("models:\n", "models:\n  other:\n    like: tiny\n");
    let output = w.tronie(&["generate", "x"]).output().unwrap();
    w.assert_fails(&output, 2, &["model", "other, tiny"]);
}

#[test]
fn a_prompt_is_asked_for() {
    let w = Workshop::new();
    let output = w.tronie(&["generate", "--model", "tiny"]).output().unwrap();
    w.assert_fails(&output, 2, &["prompt", "--latents-in"]);
}

#[test]
fn a_missing_weight_file_is_named() {
    let w = Workshop::new();
    std::fs::remove_file(w.path(UNET)).unwrap();
    w.assert_fails(&w.generate(&[]), 4, &[UNET, "missing", "models.yaml"]);
}

#[test]
fn a_truncated_weight_file_is_refused() {
    let w = Workshop::new();
    let bytes = std::fs::read(w.path(UNET)).unwrap();
    std::fs::write(w.path(UNET), &bytes[..bytes.len() - 1000]).unwrap();
    w.assert_fails(&w.generate(&[]), 4, &[UNET, "truncated"]);
}

#[test]
fn a_weight_of_another_shape_is_named_with_both_shapes() {
    let w = Workshop::new();
    w.edit_catalogue(
        UNET,
        "tiny-refiner/unet/diffusion_pytorch_model.safetensors",
    );
    w.assert_fails(&w.generate(&[]), 4, &["tiny-refiner", "expected", "["]);
}

#[test]
fn weights_of_another_component_lack_tensors() {
    let w = Workshop::new();
    w.edit_catalogue(UNET, "tiny/vae/diffusion_pytorch_model.safetensors");
    w.assert_fails(&w.generate(&[]), 4, &["vae", "to_k.weight"]);
}

#[test]
fn a_pickle_is_refused_by_its_content() {
    let w = Workshop::new();
    std::fs::write(w.path(UNET), b"\x80\x02}q\x00.").unwrap();
    w.assert_fails(&w.generate(&[]), 4, &[UNET, "pickle"]);
}

#[test]
fn a_missing_graph_is_named() {
    let w = Workshop::new();
    std::fs::remove_file(w.path("graphs/tiny/unet.fused.onnx.gz")).unwrap();
    w.assert_fails(&w.generate(&[]), 4, &["unet.fused.onnx.gz", "export"]);
}

#[test]
fn garbage_instead_of_a_graph_is_refused() {
    let w = Workshop::new();
    std::fs::write(w.path("graphs/tiny/unet.fused.onnx.gz"), b"no graph at all").unwrap();
    w.assert_fails(&w.generate(&[]), 4, &["unet.fused.onnx.gz"]);
}

#[test]
fn a_graph_of_another_network_is_refused_by_its_inputs() {
    let w = Workshop::new();
    let (unet, vae) = (
        "graphs/tiny/unet.fused.onnx.gz",
        "graphs/tiny/vae_decoder.fused.onnx.gz",
    );
    std::fs::copy(w.path(vae), w.path(unet)).unwrap();
    w.assert_fails(&w.generate(&[]), 4, &[]);
}

#[test]
fn an_unknown_key_in_the_catalogue_is_named_with_its_place() {
    let w = Workshop::new();
    w.edit_catalogue("    role: base", "    role: base\n    rolle: base");
    w.assert_fails(&w.generate(&[]), 4, &["models.yaml", "rolle", "line"]);
}

#[test]
fn a_wrong_type_in_the_catalogue_is_named_with_its_place() {
    let w = Workshop::new();
    w.edit_catalogue("scaling_factor: ", "scaling_factor: very ");
    w.assert_fails(
        &w.generate(&[]),
        4,
        &["models.yaml", "scaling_factor", "line"],
    );
}

#[test]
fn a_duplicate_key_in_the_catalogue_is_refused() {
    let w = Workshop::new();
    w.edit_catalogue("    role: base", "    role: base\n    role: base");
    w.assert_fails(&w.generate(&[]), 4, &["models.yaml", "duplicate"]);
}

#[test]
fn a_size_that_is_no_multiple_of_8_names_the_nearest() {
    let w = Workshop::new();
    w.assert_fails(
        &w.generate(&["--width", "131"]),
        2,
        &["width", "131", "multiple of 8", "128"],
    );
    w.assert_fails(
        &w.generate(&["--height", "3"]),
        2,
        &["height", "nearest is 8"],
    );
    w.assert_fails(&w.generate(&["--height", "0"]), 2, &["height"]);
    w.assert_fails(&w.generate(&["--width", "1000000"]), 2, &["width", "16384"]);
}

#[test]
fn steps_outside_the_schedule_are_refused() {
    let w = Workshop::new();
    for steps in ["0", "5000"] {
        let arguments = ["generate", "x", "--model", "tiny", "--steps", steps];
        w.assert_fails(
            &w.tronie(&arguments).output().unwrap(),
            2,
            &["steps", steps],
        );
    }
}

#[test]
fn guidance_that_is_no_number_is_refused() {
    let w = Workshop::new();
    for guidance in ["nan", "inf", "-inf"] {
        w.assert_fails(
            &w.generate(&[&format!("--guidance={guidance}")]),
            2,
            &["guidance", "finite"],
        );
    }
    w.assert_fails(
        &w.generate(&["--guidance-rescale", "1.5"]),
        2,
        &["guidance-rescale"],
    );
}

#[test]
fn an_output_that_cannot_be_written_is_found_before_the_work() {
    let w = Workshop::new();
    std::fs::write(w.path("file"), b"").unwrap();
    std::fs::create_dir(w.path("folder.PNG")).unwrap();
    let output = w.generate(&["--output", "file/picture.png"]);
    w.assert_fails(&output, 7, &["file/picture.png"]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("loading"));
    w.assert_fails(
        &w.generate(&["--output", "folder.PNG"]),
        7,
        &["folder.PNG", "folder"],
    );
    w.assert_fails(
        &w.generate(&["--output", "picture.jpg"]),
        2,
        &["output", ".png"],
    );
}

#[test]
fn latents_that_are_not_whole_are_refused() {
    let w = Workshop::new();
    let saved = w.generate(&["--stop-at", "2", "--latents-out", "half.safetensors"]);
    assert!(
        saved.status.success(),
        "{}",
        String::from_utf8_lossy(&saved.stderr)
    );
    let bytes = std::fs::read(w.path("half.safetensors")).unwrap();
    let resume = |content: &[u8]| {
        std::fs::write(w.path("half.safetensors"), content).unwrap();
        w.tronie(&["generate", "--latents-in", "half.safetensors"])
            .output()
            .unwrap()
    };
    for cut in [0, 7, 40, bytes.len() / 2, bytes.len() - 1] {
        w.assert_fails(&resume(&bytes[..cut]), 3, &["half.safetensors"]);
    }
    let mut nan = bytes.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    w.assert_fails(&resume(&nan), 3, &["half.safetensors", "finite"]);
    w.assert_fails(
        &resume(&std::fs::read(w.path(UNET)).unwrap()),
        3,
        &["request"],
    );
    let absent = w
        .tronie(&["generate", "--latents-in", "nothing"])
        .output()
        .unwrap();
    w.assert_fails(&absent, 3, &["nothing"]);
}

#[test]
fn an_unknown_scheduler_lists_the_known_ones() {
    let w = Workshop::new();
    let output = w.generate(&["--scheduler", "eulerr"]);
    w.assert_fails(
        &output,
        2,
        &["eulerr", "euler", "ddim", "dpmpp-2m", "sa-solver"],
    );
    w.assert_fails(
        &w.generate(&["--scheduler", "ddim", "--sigmas", "karras"]),
        2,
        &["sigmas", "karras"],
    );
}

#[test]
fn a_provider_that_is_not_available_says_why_and_computes_nothing() {
    let w = Workshop::new();
    for provider in ["cuda", "trt", "coreml"] {
        let output = w.generate(&["--provider", provider]);
        w.assert_fails(&output, 5, &[provider, "not available"]);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("step"));
    }
    w.assert_fails(&w.generate(&["--provider", "tpu"]), 2, &["tpu", "coreml"]);
}

#[test]
fn a_missing_library_says_how_to_get_it() {
    let w = Workshop::new();
    let output = w.generate(&["--ort-lib", "nowhere.so"]);
    w.assert_fails(&output, 5, &["nowhere.so", "pip install onnxruntime"]);
    std::fs::write(w.path("fake.so"), b"this is no library").unwrap();
    w.assert_fails(&w.generate(&["--ort-lib", "fake.so"]), 5, &["fake.so"]);
}

#[test]
fn a_library_that_is_too_old_is_named_with_its_version() {
    let folder = std::env::var("TRONIE_OLD_ORT")
        .expect("`make test` names an old ONNX Runtime in TRONIE_OLD_ORT");
    let w = Workshop::new();
    let output = w.generate(&["--ort-lib", &folder]);
    w.assert_fails(&output, 5, &["1.22", "1.24"]);
}

#[test]
fn a_refiner_without_a_share_of_the_steps_is_refused() {
    let w = Workshop::new();
    w.assert_fails(
        &w.generate(&["--refine-at", "0.5"]),
        2,
        &["refine-at", "--refiner"],
    );
    let refined = |at: &str| w.generate(&["--refiner", "tiny-refiner", "--refine-at", at]);
    w.assert_fails(&refined("1.0"), 2, &["refine-at"]);
    w.assert_fails(&refined("nan"), 2, &["refine-at"]);
    w.assert_fails(&refined("0.999"), 2, &["refine-at", "no step"]);
    w.assert_fails(
        &w.generate(&["--refiner", "nobody"]),
        2,
        &["refiner", "nobody"],
    );
}

#[test]
fn stopping_without_saving_is_refused() {
    let w = Workshop::new();
    w.assert_fails(
        &w.generate(&["--stop-at", "2"]),
        2,
        &["stop-at", "--latents-out"],
    );
    let beyond = w.generate(&["--stop-at", "5", "--latents-out", "a.out.safetensors"]);
    w.assert_fails(&beyond, 2, &["stop-at", "4"]);
    let handoff = w.generate(&["--stop-at", "handoff", "--latents-out", "a.out.safetensors"]);
    w.assert_fails(&handoff, 2, &["stop-at", "--refiner"]);
}

#[test]
fn a_request_file_with_an_unknown_field_is_refused() {
    let w = Workshop::new();
    std::fs::write(
        w.path("r.json"),
        r#"{"prompt": "x", "model": "tiny", "promt-2": "y"}"#,
    )
    .unwrap();
    let output = w
        .tronie(&["generate", "--request", "r.json"])
        .output()
        .unwrap();
    w.assert_fails(&output, 3, &["r.json", "promt-2", "line"]);
}

#[test]
fn inspecting_a_file_without_a_request_says_so() {
    let w = Workshop::new();
    for file in [UNET, "models.yaml"] {
        let output = w.tronie(&["inspect", file]).output().unwrap();
        w.assert_fails(&output, 3, &[file]);
    }
}

#[test]
fn fields_that_would_have_no_effect_are_refused() {
    let w = Workshop::new();
    w.assert_fails(
        &w.generate(&["--negative-2", "x"]),
        2,
        &["negative-2", "--negative"],
    );
    w.assert_fails(
        &w.generate(&["--negative-target-size", "64x64"]),
        2,
        &["together"],
    );
}

#[test]
fn flags_that_are_no_numbers_are_refused_over_a_request_too() {
    let w = Workshop::new();
    let json = r#"{"prompt": "x", "model": "tiny", "steps": 4, "guidance": 7.0, "refiner": "tiny-refiner"}"#;
    std::fs::write(w.path("r.json"), json).unwrap();
    for (flag, field) in [
        ("--guidance=nan", "guidance"),
        ("--refine-at=nan", "refine-at"),
        ("--guidance=1e39", "guidance"),
    ] {
        let output = w
            .tronie(&["generate", "--request", "r.json", flag])
            .output()
            .unwrap();
        w.assert_fails(&output, 2, &[field, "finite"]);
    }
}

#[test]
fn results_may_not_overwrite_each_other() {
    let w = Workshop::new();
    let same = w.generate(&["--output", "a.png", "--latents-out", "a.png"]);
    w.assert_fails(&same, 2, &["latents-out", "same file"]);
    let numbered = w.generate(&[
        "--batch",
        "2",
        "--output",
        "a.png",
        "--latents-out",
        "a-1.png",
    ]);
    w.assert_fails(&numbered, 2, &["latents-out", "same file"]);
}

#[test]
fn a_refused_request_leaves_no_folder() {
    let w = Workshop::new();
    let arguments = [
        "generate",
        "x",
        "--model",
        "tiny",
        "--steps",
        "0",
        "--output",
        "new/sub/a.png",
    ];
    w.assert_fails(&w.tronie(&arguments).output().unwrap(), 2, &["steps"]);
    assert!(!w.path("new").exists());
}

#[test]
fn absurd_sizes_in_the_catalogue_are_refused() {
    for (from, to) in [
        ("length: 77", "length: 9223372036854775807"),
        ("in_channels: 4", "in_channels: 4611686018427387904"),
        ("scale: 8", "scale: 4"),
    ] {
        let w = Workshop::new();
        w.edit_catalogue(from, to);
        w.assert_fails(&w.generate(&["--width", "64", "--height", "64"]), 4, &[]);
    }
}

#[test]
fn a_text_may_begin_with_a_hyphen() {
    let w = Workshop::new();
    let output = w.generate(&["--negative", "-blurry", "--output", "a.png"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_panic() {
    let w = Workshop::new();
    let script = format!(
        "{} models | true; {0} generate x --model tiny --steps 1 2>/dev/full",
        env!("CARGO_BIN_EXE_tronie")
    );
    let mut shell = std::process::Command::new("sh");
    let environment = w.tronie(&[]);
    shell.args(["-c", &script]).current_dir(w.path("."));
    shell.envs(
        environment
            .get_envs()
            .filter_map(|(k, v)| v.map(|v| (k, v))),
    );
    let output = shell.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
