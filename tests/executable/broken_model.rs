//! Networks that compute nonsense, and runs that are interrupted: named, and never a picture.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::workshop::Workshop;

/// Overwrites every value of one f16 tensor in a safetensors file.
fn fill(path: &Path, tensor: &str, bits: u16) {
    let mut bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    assert_eq!(header[tensor]["dtype"], "F16", "{tensor}");
    let place =
        |i: usize| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize + 8 + length;
    for value in bytes[place(0)..place(1)].as_chunks_mut().0 {
        *value = bits.to_le_bytes();
    }
    std::fs::write(path, bytes).unwrap();
}

const NAN: u16 = 0x7e00;

#[test]
fn a_unet_that_makes_nan_stops_at_its_step() {
    let w = Workshop::new();
    fill(
        &w.path("tiny/unet/diffusion_pytorch_model.safetensors"),
        "conv_out.bias",
        NAN,
    );
    w.assert_fails(&w.generate(&[]), 5, &["unet", "non-finite", "step 0"]);
}

#[test]
fn a_refiner_that_makes_nan_stops_at_its_first_step() {
    let w = Workshop::new();
    fill(
        &w.path("tiny-refiner/unet/diffusion_pytorch_model.safetensors"),
        "conv_out.bias",
        NAN,
    );
    let output = w.generate(&["--refiner", "tiny-refiner", "--refine-at", "0.5"]);
    w.assert_fails(&output, 5, &["unet", "non-finite", "step 2"]);
}

#[test]
fn a_text_encoder_that_makes_nan_is_named() {
    let w = Workshop::new();
    let weights = w.path("tiny/text_encoder_2/model.safetensors");
    fill(
        &weights,
        "text_model.embeddings.position_embedding.weight",
        NAN,
    );
    w.assert_fails(&w.generate(&[]), 5, &["text_encoder_2", "non-finite"]);
}

#[test]
fn a_vae_that_makes_nan_is_named() {
    let w = Workshop::new();
    fill(
        &w.path("tiny/vae/diffusion_pytorch_model.safetensors"),
        "decoder.conv_out.bias",
        NAN,
    );
    w.assert_fails(&w.generate(&[]), 5, &["vae_decoder", "non-finite"]);
}

#[test]
fn a_black_picture_is_no_success() {
    let w = Workshop::new();
    let minus_hundred = 0xd640;
    fill(
        &w.path("tiny/vae/diffusion_pytorch_model.safetensors"),
        "decoder.conv_out.bias",
        minus_hundred,
    );
    w.assert_fails(&w.generate(&[]), 5, &["vae_decoder", "black"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_run_inside_its_step() {
    let w = Workshop::new();
    // Large enough that one step takes seconds.
    let size = ["--width", "1536", "--height", "1536", "--steps", "50"];
    let arguments = [
        &["generate", "x", "--model", "tiny", "--output", "a.png"],
        &size[..],
    ]
    .concat();
    let mut running = w.tronie(&arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stderr.take().unwrap()).lines();
    let started = lines.find(|line| line.as_ref().is_ok_and(|l| l.starts_with("denoising")));
    assert!(started.is_some());
    std::thread::sleep(Duration::from_millis(300));
    let interrupted = Instant::now();
    Command::new("kill")
        .args(["-INT", &running.id().to_string()])
        .status()
        .unwrap();
    let rest = lines.map_while(Result::ok).collect::<Vec<_>>().join("\n");
    let status = running.wait().unwrap();
    assert_eq!(status.code(), Some(6), "{rest}");
    assert!(rest.contains("cancelled at step 0"), "{rest}");
    assert!(
        interrupted.elapsed() < Duration::from_secs(20),
        "{:?}",
        interrupted.elapsed()
    );
    assert!(w.made_files().is_empty());
}
