//! Memory modes: what they change, what they must not, and what they tell.

use crate::workshop::Workshop;

/// Larger than the tiny VAE's tile of 128 px.
const LARGE: [&str; 4] = ["--width", "200", "--height", "136"];

fn paint(w: &Workshop, arguments: &[&str], output: &str) -> (Vec<u8>, String) {
    let run = w.generate(&[arguments, &["--output", output]].concat());
    let message = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{message}");
    (pixels(w, output), message)
}

fn pixels(w: &Workshop, name: &str) -> Vec<u8> {
    image::open(w.path(name)).unwrap().to_rgb8().into_raw()
}

fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn the_modes_paint_the_same_picture_within_a_level() {
    let w = Workshop::new();
    let [low, balanced, fast] = ["low", "balanced", "fast"].map(|mode| {
        let arguments = ["--memory", mode, "--vae-tiling", "off"];
        paint(
            &w,
            &[&LARGE[..], &arguments].concat(),
            &format!("{mode}.png"),
        )
        .0
    });
    assert!(largest_difference(&low, &fast) <= 1);
    assert!(largest_difference(&balanced, &fast) <= 1);
}

#[test]
fn low_decodes_in_tiles_and_says_so_in_the_picture() {
    let w = Workshop::new();
    let (low, _) = paint(&w, &[&LARGE[..], &["--memory", "low"]].concat(), "low.png");
    let tiled = ["--memory", "fast", "--vae-tiling", "128"];
    let (tiled, _) = paint(&w, &[&LARGE[..], &tiled].concat(), "tiled.png");
    let (whole, _) = paint(
        &w,
        &[&LARGE[..], &["--memory", "fast"]].concat(),
        "whole.png",
    );
    assert!(largest_difference(&low, &tiled) <= 1);
    assert!(largest_difference(&low, &whole) > 1);
    let request = w.tronie(&["inspect", "low.png"]).output().unwrap().stdout;
    let request: serde_json::Value = serde_json::from_slice(&request).unwrap();
    assert_eq!(request["memory"], "low");
    assert_eq!(request["vae-tiling"], 128);
    let again = ["generate", "--request", "low.png", "--output", "again.png"];
    assert!(w.tronie(&again).output().unwrap().status.success());
    let file = |name| std::fs::read(w.path(name)).unwrap();
    assert_eq!(file("low.png"), file("again.png"));
}

#[test]
fn the_mode_that_was_chosen_is_said_and_recorded() {
    let w = Workshop::new();
    let (_, message) = paint(&w, &[], "auto.png");
    assert!(message.contains("memory mode "), "{message}");
    let request = w.tronie(&["inspect", "auto.png"]).output().unwrap().stdout;
    let request: serde_json::Value = serde_json::from_slice(&request).unwrap();
    let mode = request["memory"].as_str().unwrap();
    assert!(
        message.contains(&format!("memory mode {mode}:")),
        "{message}"
    );
    let (_, message) = paint(&w, &["--memory", "balanced"], "named.png");
    assert!(!message.contains("memory mode"), "{message}");
}

#[test]
fn a_run_goes_on_in_another_mode() {
    let w = Workshop::new();
    let first = [
        "--memory",
        "low",
        "--stop-at",
        "2",
        "--latents-out",
        "half.safetensors",
    ];
    assert!(w.generate(&first).status.success());
    let second = [
        "generate",
        "--latents-in",
        "half.safetensors",
        "--memory",
        "fast",
        "--output",
        "r.png",
    ];
    let output = w.tronie(&second).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn unknown_modes_and_tiles_are_refused_with_what_is_known() {
    let w = Workshop::new();
    let output = w.generate(&["--memory", "huge"]);
    w.assert_fails(&output, 2, &["huge", "low, balanced, fast"]);
    for tile in ["56", "100"] {
        let output = w.generate(&["--vae-tiling", tile]);
        w.assert_fails(&output, 2, &["vae-tiling", "multiple of 8, at least 64 px"]);
    }
    let output = w.generate(&["--vae-tiling", "sometimes"]);
    w.assert_fails(
        &output,
        2,
        &["sometimes", "auto, on, off, or a tile's side"],
    );
}
