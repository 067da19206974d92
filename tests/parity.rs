//! Whole runs against diffusers, number by number. A case is a file made by `export/golden/parity.py`: add a file, get
//! a comparison.
//!
//! `tests/golden/tiny` is in the repository. `make test` makes many more on freshly exported random checkpoints and
//! names their folder in `TRONIE_PARITY`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use ndarray::{Array4, ArrayD, Axis, IxDyn};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use tronie::conditioning::Prompts;
use tronie::manifest::{Catalogue, FileRef};
use tronie::memory::MemoryMode;
use tronie::pipeline::{Options, Pipeline, Read};
use tronie::request::Request;
use tronie::text::{Frame, Tokenizer};
use tronie::{Control, Event};

/// Largest difference over largest magnitude: embeddings, which are one evaluation's.
const EVALUATION: f64 = 1e-5;
/// The same for network outputs after guidance, which multiplies the rounding of two evaluations.
const GUIDED: f64 = 2e-5;
/// The same where LoRAs are in layers of their own: PEFT adds their product to a layer's output, tronie to its weights, so
/// that f32 rounds elsewhere.
const BESIDE: f64 = 5e-5;
/// The same for latents after the whole run.
const RUN: f64 = 1e-4;

struct Case {
    name: String,
    request: Request,
    catalogue: PathBuf,
    bytes: Vec<u8>,
}

impl Case {
    fn load(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let mut request = Request::from_json(&metadata["request"], path).unwrap();
        // Pictures and LoRAs lie beside the case.
        for prompt in request.image_prompts.iter_mut().flatten() {
            let lists = [&mut prompt.pictures, &mut prompt.faces, &mut prompt.masks];
            let files = lists.into_iter().flatten().chain(&mut prompt.negative);
            for file in files.chain(&mut prompt.negative_face) {
                *file = path.with_file_name(&*file);
            }
        }
        for lora in request.loras.iter_mut().flatten() {
            lora.lora = path.with_file_name(&lora.lora).display().to_string();
        }
        let catalogue = path.parent().unwrap().join(&metadata["catalogue"]);
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        Self {
            name,
            request,
            catalogue,
            bytes,
        }
    }

    fn f32(&self, name: &str) -> Option<ArrayD<f32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        let values = view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        Some(ArrayD::from_shape_vec(IxDyn(view.shape()), values).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap()
            .tensor(name)
            .unwrap()
            .data()
            .to_vec()
    }

    fn i64(&self, name: &str) -> Option<Vec<i64>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        Some(
            view.data()
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect(),
        )
    }
}

/// Largest difference as a share of the reference's largest magnitude.
fn difference(found: &ArrayD<f32>, reference: &ArrayD<f32>) -> f64 {
    if found.shape() != reference.shape() {
        return f64::INFINITY;
    }
    let largest = reference
        .iter()
        .fold(0.0_f64, |m, v| m.max(f64::from(v.abs())));
    let apart = found.iter().zip(reference).fold(0.0_f64, |m, (a, b)| {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    if apart == 0.0 { 0.0 } else { apart / largest }
}

/// What a case's run differed in.
#[derive(Default)]
struct Findings {
    problems: Vec<String>,
    worst_output: f64,
    last_latents: f64,
}

impl Findings {
    fn within(&mut self, what: &str, found: f64, limit: f64) {
        if found.is_nan() || found > limit {
            self.problems
                .push(format!("{what}: {found:.2e} > {limit:.0e}"));
        }
    }
}

fn tokens(case: &Case, pipeline: &Pipeline, findings: &mut Findings) {
    let model = &pipeline.catalogue().models[case.request.model.as_ref().unwrap()];
    for (place, entry) in model.text.iter().enumerate() {
        let file = |f: &Option<FileRef>| match f {
            Some(FileRef::Path(path)) => Some(pipeline.catalogue().locate(path)),
            _ => None,
        };
        let facts = &entry.tokenizer;
        let frame = Frame {
            bos: facts.bos,
            eos: facts.eos,
            pad: facts.pad,
            length: facts.length,
        };
        let tokenizer = match (file(&facts.vocab), file(&facts.merges), file(&facts.json)) {
            (Some(vocab), Some(merges), None) => Tokenizer::from_vocab(&vocab, &merges, frame),
            (None, None, Some(json)) => Tokenizer::from_json(&json, frame),
            other => panic!("{other:?}"),
        };
        // What diffusers does not tokenize itself has tests of its own.
        let Some(expected) = case.i64(&format!("ids.{place}")) else {
            continue;
        };
        let prompts = [Some(&case.request.prompt), case.request.prompt_2.as_ref()];
        let prompt = prompts[place].unwrap_or(&case.request.prompt);
        let found = tokenizer.unwrap().encode("prompt", prompt).unwrap().ids;
        if found != expected {
            findings
                .problems
                .push(format!("token ids of encoder {place} differ"));
        }
    }
}

fn embeddings(case: &Case, pipeline: &Pipeline, findings: &mut Findings) {
    let resolved = case.request.resolve(pipeline.catalogue(), 0).unwrap();
    let name = &resolved.model;
    let prompts = Prompts::new(&resolved.request, &pipeline.catalogue().models[name]).unwrap();
    let mut told = vec![prompts.positive(0, resolved.steps)];
    if resolved.guidance_at(0, resolved.steps) > 1.0 {
        told.insert(0, prompts.negative(0, resolved.steps));
    }
    let mut ignore = |_: Event<'_>| Control::Continue;
    let reads = pipeline.read(&resolved, name, &told, &mut ignore).unwrap();
    let chunks = reads.iter().map(Read::chunks).max().unwrap();
    let branches = reads.iter().map(|read| (read, chunks)).collect::<Vec<_>>();
    let encoded = pipeline
        .encode(&resolved, name, &branches, &mut ignore)
        .unwrap();
    let hidden = encoded.iter().map(|e| e.hidden.view()).collect::<Vec<_>>();
    let pooled = encoded.iter().map(|e| e.pooled.view()).collect::<Vec<_>>();
    let hidden = ndarray::stack(Axis(0), &hidden).unwrap().into_dyn();
    let pooled = ndarray::stack(Axis(0), &pooled).unwrap().into_dyn();
    let apart = difference(&hidden, &case.f32("hidden").unwrap());
    findings.within("text embeddings", apart, EVALUATION);
    let apart = difference(&pooled, &case.f32("pooled").unwrap());
    findings.within("pooled", apart, EVALUATION);
}

fn run(case: &Case, pipeline: &Pipeline, findings: &mut Findings) {
    let mut outputs: Vec<(f64, Array4<f32>)> = Vec::new();
    let mut latents: Vec<Array4<f32>> = Vec::new();
    let output = pipeline.generate(&case.request, &mut |event| {
        match event {
            Event::ModelOutput {
                timestep, output, ..
            } => outputs.push((timestep, output.clone())),
            Event::Step { latents: now, .. } => latents.push(now.clone()),
            _ => {}
        }
        Control::Continue
    });
    let output = output.unwrap_or_else(|e| panic!("{}: {e}", case.name));
    for (step, (timestep, found)) in outputs.iter().enumerate() {
        let Some(reference) = case.f32(&format!("output.{step}")) else {
            findings
                .problems
                .push(format!("diffusers has no step {step}"));
            continue;
        };
        let bytes = case.bytes(&format!("timestep.{step}"));
        let expected = f64::from_le_bytes(bytes.try_into().unwrap());
        findings.within(
            &format!("timestep of step {step}"),
            (timestep - expected).abs(),
            1e-3,
        );
        let apart = difference(&found.clone().into_dyn(), &reference);
        findings.worst_output = findings.worst_output.max(apart);
        let limit = case.request.loras.as_ref().map_or(GUIDED, |_| BESIDE);
        findings.within(&format!("network output of step {step}"), apart, limit);
    }
    if case.f32(&format!("output.{}", outputs.len())).is_some() {
        findings
            .problems
            .push(format!("diffusers has more than {} steps", outputs.len()));
    }
    let reference = case.f32(&format!("latents.{}", latents.len())).unwrap();
    findings.last_latents = difference(&latents.last().unwrap().clone().into_dyn(), &reference);
    findings.within("final latents", findings.last_latents, RUN);
    pictures(case, &output.pictures, findings);
}

/// What the image encoder sees in every picture, a prompt's negative one last.
fn sights(case: &Case, pipeline: &Pipeline, findings: &mut Findings) {
    let prompts = case.request.image_prompts.iter().flatten();
    let model = case.request.model.as_ref().unwrap();
    let adapters = &pipeline.catalogue().models[model].adapters;
    let prompts = prompts.filter(|prompt| adapters[&prompt.adapter].form.sees_pictures());
    let pictures = prompts.flat_map(|prompt| {
        let (files, negative) = if prompt.faces.is_empty() {
            (&prompt.pictures, &prompt.negative)
        } else {
            (&prompt.faces, &prompt.negative_face)
        };
        let files = files.iter().chain(negative);
        files.map(move |file| (prompt, file))
    });
    for (row, (prompt, file)) in pictures.enumerate() {
        let crop = prompt.crop.unwrap_or_default();
        let mut ignore = |_: Event<'_>| Control::Continue;
        let (seen, _) = pipeline
            .embed_image(
                (model, &prompt.adapter),
                (file, crop),
                MemoryMode::Balanced,
                &mut ignore,
            )
            .unwrap();
        for (name, found) in [
            ("image_embeds", seen.image_embeds),
            ("hidden_states", seen.hidden_states),
        ] {
            let reference = case.f32(name).unwrap().select(Axis(0), &[row]);
            let apart = difference(&found, &reference);
            findings.within(&format!("{name} of picture {row}"), apart, EVALUATION);
        }
    }
}

/// Within one level on 99.9 % of the values.
fn pictures(case: &Case, found: &[image::RgbImage], findings: &mut Findings) {
    let reference = case.bytes("pictures");
    let found = found
        .iter()
        .flat_map(|p| p.as_raw().iter().copied())
        .collect::<Vec<u8>>();
    if found.len() != reference.len() {
        findings.problems.push(format!(
            "pictures have {} values, not {}",
            found.len(),
            reference.len()
        ));
        return;
    }
    let off = found
        .iter()
        .zip(&reference)
        .filter(|(a, b)| a.abs_diff(**b) > 1)
        .count();
    findings.within(
        "share of values more than one level apart",
        off as f64 / found.len() as f64,
        1e-3,
    );
}

/// The noise itself, bit for bit: initial latents are noise times one factor.
fn noise(case: &Case, pipeline: &Pipeline, findings: &mut Findings) {
    let reference = case.f32("latents.0").unwrap();
    let resolved = case.request.resolve(pipeline.catalogue(), 0).unwrap();
    let schedule = pipeline.schedule(&resolved).unwrap();
    let plan = pipeline
        .prepare(&resolved, schedule, &(0..0), &mut |_| Control::Continue)
        .unwrap();
    let found = pipeline.first_latents(&plan, &resolved).latents.into_dyn();
    // The factor is computed in f32 there and in f64 here, so one unit in the last place is allowed on the product.
    let close = found.shape() == reference.shape()
        && found
            .iter()
            .zip(&reference)
            .all(|(a, b)| a.to_bits().abs_diff(b.to_bits()) <= 1);
    if !close {
        findings.problems.push("initial latents differ".into());
    }
}

fn case_files() -> Vec<PathBuf> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")];
    folders.extend(std::env::var_os("TRONIE_PARITY").map(PathBuf::from));
    let files = folders.iter().flat_map(|folder| {
        std::fs::read_dir(folder)
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
            .map(|e| e.unwrap().path())
    });
    let mut files: Vec<_> = files
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no cases in {folders:?}");
    files
}

#[test]
fn every_case_equals_diffusers() {
    let mut pipelines: Vec<(PathBuf, Pipeline)> = Vec::new();
    let mut failures = Vec::new();
    for path in case_files() {
        let case = Case::load(&path);
        if pipelines
            .iter()
            .all(|(catalogue, _)| *catalogue != case.catalogue)
        {
            let options = Options {
                models: Some(case.catalogue.clone()),
                ..Options::default()
            };
            pipelines.push((case.catalogue.clone(), Pipeline::open(options).unwrap()));
        }
        let pipeline = &pipelines
            .iter()
            .find(|(catalogue, _)| *catalogue == case.catalogue)
            .unwrap()
            .1;
        let mut findings = Findings::default();
        tokens(&case, pipeline, &mut findings);
        embeddings(&case, pipeline, &mut findings);
        noise(&case, pipeline, &mut findings);
        sights(&case, pipeline, &mut findings);
        run(&case, pipeline, &mut findings);
        println!(
            "{:<44} outputs {:.1e}  latents {:.1e}",
            case.name, findings.worst_output, findings.last_latents
        );
        failures.extend(
            findings
                .problems
                .into_iter()
                .map(|p| format!("{}: {p}", case.name)),
        );
    }
    assert!(
        failures.is_empty(),
        "{} problems:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn the_catalogues_of_the_repository_are_valid() {
    for catalogue in ["models.yaml", "tests/models/models.yaml"] {
        Catalogue::load(Path::new(env!("CARGO_MANIFEST_DIR")).join(catalogue)).unwrap();
    }
}
