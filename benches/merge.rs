//! A LoRA merged in memory as a run with `--lora` does it: tensor after tensor, each held until the end.
//!
//! `cargo bench --bench merge -- COMPONENT=FILE.safetensors … LORA.safetensors`, such as
//! `unet=…/diffusion_pytorch_model.fp16.safetensors`; measures nothing without files, which are gigabytes.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot set itself up fails by panicking"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tronie::lora::{LoraFile, change};
use tronie::memory::{Watch, anonymous};
use tronie::model_file::ModelFile;
use tronie::weights::Weights;

fn main() {
    let named: Vec<String> = std::env::args().skip(1).collect();
    let (components, loras): (Vec<_>, Vec<_>) = named
        .iter()
        .filter(|name| !name.starts_with("--"))
        .partition(|name| name.contains('='));
    let ([lora], false) = (&loras[..], components.is_empty()) else {
        println!("merge: name COMPONENT=FILE … and one LORA to measure");
        return;
    };
    let mut model: BTreeMap<String, Weights> = components
        .iter()
        .map(|named| named.split_once('=').unwrap())
        .map(|(component, file)| (component.to_owned(), Weights::open(&[file]).unwrap()))
        .collect();
    for run in 0..2 {
        merge(run, lora, &mut model.clone());
    }
    model.clear();
}

fn merge(run: usize, lora: &str, model: &mut BTreeMap<String, Weights>) {
    let before = anonymous().unwrap_or_default();
    let watch = Watch::start();
    let started = Instant::now();
    let file = LoraFile::open(&ModelFile::from(lora)).unwrap();
    let fit = file.fit(&model.iter().map(|(k, w)| (k.clone(), w)).collect());
    let opened = started.elapsed().as_secs_f64();
    let mut tensors = Vec::new();
    for matched in fit.matched {
        let (component, tensor) = (matched.component.clone(), matched.tensor.clone());
        let change = change(Arc::new(matched), 1.0);
        let weights = model.get_mut(&component).unwrap();
        weights.change(&tensor, change).unwrap();
        tensors.push((component, tensor));
    }
    let merged: Vec<_> = tensors
        .iter()
        .map(|(component, tensor)| {
            let weights = &model[component];
            let shape = weights.shape(tensor).unwrap().to_vec();
            weights.tensor_f32(tensor, &shape).unwrap()
        })
        .collect();
    let seconds = started.elapsed().as_secs_f64();
    let bytes: usize = merged.iter().map(|m| size_of_val(m.as_slice())).sum();
    let peak = watch
        .map_or(0, |watch| watch.lap().0)
        .saturating_sub(before);
    println!(
        "run {run}: {} tensors, {} unmatched, {seconds:.2} s ({opened:.2} of them to open and fit), {:.3} GB changed, peak \
         {:.3} GB anonymous: {:.2} % more",
        merged.len(),
        fit.unmatched.len(),
        bytes as f64 / 1e9,
        peak as f64 / 1e9,
        (peak as f64 / bytes as f64 - 1.0) * 100.0,
    );
}
