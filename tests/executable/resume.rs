//! A run in pieces, and a run repeated from its own picture, give the same file bit for bit.

use crate::workshop::Workshop;

fn succeed(output: &std::process::Output) {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn bytes(w: &Workshop, name: &str) -> Vec<u8> {
    std::fs::read(w.path(name)).unwrap()
}

#[test]
fn a_run_stopped_at_any_step_goes_on_to_the_same_picture() {
    let w = Workshop::new();
    // One of every kind of memory: none, x0s, drawn noise, corrected latents, noise and latents, a Brownian tree.
    for scheduler in [
        "euler",
        "ddim",
        "dpmpp-2m",
        "euler-ancestral",
        "unipc",
        "sa-solver",
        "dpmpp-sde",
    ] {
        let common = [
            "--scheduler",
            scheduler,
            "--refiner",
            "tiny-refiner",
            "--refine-at",
            "0.5",
        ];
        succeed(
            &w.generate(
                &[
                    &common[..],
                    &[
                        "--output",
                        "whole.png",
                        "--latents-out",
                        "whole.safetensors",
                    ],
                ]
                .concat(),
            ),
        );
        for stop in ["0", "1", "2", "3", "4", "handoff"] {
            let first = ["--stop-at", stop, "--latents-out", "half.safetensors"];
            succeed(&w.generate(&[&common[..], &first].concat()));
            let second = [
                "generate",
                "--latents-in",
                "half.safetensors",
                "--output",
                "resumed.png",
            ];
            let output = w
                .tronie(&[&second[..], &["--latents-out", "resumed.safetensors"]].concat())
                .output()
                .unwrap();
            succeed(&output);
            assert_eq!(
                bytes(&w, "whole.png"),
                bytes(&w, "resumed.png"),
                "{scheduler} stopped at {stop}"
            );
            assert_eq!(
                bytes(&w, "whole.safetensors"),
                bytes(&w, "resumed.safetensors"),
                "{scheduler} at {stop}"
            );
        }
    }
}

#[test]
fn a_run_in_three_pieces_is_the_whole_run() {
    let w = Workshop::new();
    succeed(&w.generate(&["--scheduler", "dpmpp-2m", "--output", "whole.png"]));
    succeed(&w.generate(&[
        "--scheduler",
        "dpmpp-2m",
        "--stop-at",
        "2",
        "--latents-out",
        "a",
    ]));
    let on = [
        "generate",
        "--latents-in",
        "a",
        "--stop-at",
        "3",
        "--latents-out",
        "b",
    ];
    succeed(&w.tronie(&on).output().unwrap());
    succeed(
        &w.tronie(&["generate", "--latents-in", "b", "--output", "pieces.png"])
            .output()
            .unwrap(),
    );
    assert_eq!(bytes(&w, "whole.png"), bytes(&w, "pieces.png"));
}

#[test]
fn a_picture_repeats_itself_from_the_request_inside() {
    let w = Workshop::new();
    let request = [
        "--negative",
        "blurred \u{1f99c}",
        "--guidance-rescale",
        "0.3",
        "--spacing",
        "trailing",
    ];
    succeed(&w.generate(&[&request[..], &["--output", "a.png"]].concat()));
    let printed = w.tronie(&["inspect", "a.png"]).output().unwrap();
    succeed(&printed);
    std::fs::write(w.path("request.json"), printed.stdout).unwrap();
    for origin in ["a.png", "request.json"] {
        succeed(
            &w.tronie(&["generate", "--request", origin, "--output", "b.png"])
                .output()
                .unwrap(),
        );
        assert_eq!(bytes(&w, "a.png"), bytes(&w, "b.png"), "from {origin}");
    }
}

#[test]
fn a_batch_repeats_itself_from_any_of_its_pictures() {
    let w = Workshop::new();
    succeed(&w.generate(&["--batch", "3", "--output", "a.png"]));
    succeed(
        &w.tronie(&["generate", "--request", "a-1.png", "--output", "b.png"])
            .output()
            .unwrap(),
    );
    for i in 0..3 {
        assert_eq!(
            bytes(&w, &format!("a-{i}.png")),
            bytes(&w, &format!("b-{i}.png"))
        );
    }
    assert_ne!(bytes(&w, "a-0.png"), bytes(&w, "a-1.png"));
}

#[test]
fn both_ways_to_run_guidance_give_the_same_picture() {
    let w = Workshop::new();
    let levels = |name: &str| image::open(w.path(name)).unwrap().to_rgb8().into_raw();
    succeed(&w.generate(&["--guidance-runs", "batch", "--output", "a.png"]));
    succeed(&w.generate(&["--guidance-runs", "split", "--output", "b.png"]));
    let apart = levels("a.png")
        .iter()
        .zip(levels("b.png"))
        .filter(|(a, b)| a.abs_diff(*b) > 1)
        .count();
    assert_eq!(apart, 0);
}

#[test]
fn what_shaped_the_latents_cannot_change_between_pieces() {
    let w = Workshop::new();
    succeed(&w.generate(&["--stop-at", "2", "--latents-out", "half.safetensors"]));
    let changes = [
        ["--steps", "5"],
        ["--scheduler", "ddim"],
        ["--width", "64"],
        ["--seed", "4"],
        ["--batch", "2"],
        ["--guidance", "9"],
        ["--negative", "y"],
    ];
    for change in changes {
        let arguments = [
            &["generate", "--latents-in", "half.safetensors"],
            &change[..],
        ]
        .concat();
        let output = w.tronie(&arguments).output().unwrap();
        w.assert_fails(
            &output,
            2,
            &[change[0].trim_start_matches('-'), "saved latents"],
        );
    }
}

#[test]
fn the_seed_that_was_drawn_is_in_the_picture() {
    let w = Workshop::new();
    let run = ["generate", "x", "--model", "tiny", "--steps", "2", "--json"];
    let output = w.tronie(&run).output().unwrap();
    succeed(&output);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let picture = json["files"][0].as_str().unwrap();
    assert!(json["seconds"]["denoise"].as_f64().unwrap() > 0.0);
    assert!(
        json["peak-memory-bytes"].as_u64().is_some_and(|b| b > 0) || !cfg!(target_os = "linux")
    );
    let inspected = w.tronie(&["inspect", picture]).output().unwrap();
    let inside: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(inside["seed"], json["request"]["seed"]);
    assert!(inside["seed"].as_u64().is_some());
}

#[test]
fn the_refiner_may_still_be_chosen_at_the_handoff() {
    let w = Workshop::new();
    let refiner = ["--refiner", "tiny-refiner", "--refine-at", "0.5"];
    succeed(&w.generate(&[&refiner[..], &["--output", "whole.png"]].concat()));
    succeed(&w.generate(&["--stop-at", "2", "--latents-out", "half"]));
    let on = ["generate", "--latents-in", "half", "--output", "later.png"];
    succeed(
        &w.tronie(&[&on[..], &refiner[..]].concat())
            .output()
            .unwrap(),
    );
    assert_eq!(bytes(&w, "whole.png"), bytes(&w, "later.png"));
    let too_late = [
        &on[..],
        &["--refiner", "tiny-refiner", "--refine-at", "0.2"],
    ]
    .concat();
    let output = w.tronie(&too_late).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn every_digit_of_a_number_survives_in_the_picture() {
    let w = Workshop::new();
    // A value that a JSON reader without exact rounding gets wrong by one unit in the last place.
    succeed(&w.generate(&["--guidance", "10.413266654746877", "--output", "a.png"]));
    succeed(
        &w.tronie(&["generate", "--request", "a.png", "--output", "b.png"])
            .output()
            .unwrap(),
    );
    assert_eq!(bytes(&w, "a.png"), bytes(&w, "b.png"));
}
