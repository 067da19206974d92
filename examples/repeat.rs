//! One request several times in one process, networks kept, with the seconds of each: what `benches/gpu` measures with.
//!
//! `cargo run --release --example repeat -- request.json RUNS [LATENTS.safetensors]` prints one JSON line a run; the
//! request names model, provider and catalogue. Latents of the last run are saved where they are asked for.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tronie::{Control, Event, MemoryMode, Options, Pipeline, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "say: repeat REQUEST.json RUNS [LATENTS.safetensors]";
    let path = PathBuf::from(arguments.next().ok_or(usage)?);
    let runs: usize = arguments.next().ok_or(usage)?.parse()?;
    let latents = arguments.next().map(PathBuf::from);
    let mut request = Request::from_json(&std::fs::read_to_string(&path)?, &path)?;
    request.memory = request.memory.or(Some(MemoryMode::Fast));
    let pipeline = Pipeline::open(Options {
        models: request.models.clone(),
        ort_lib: None,
        provider: request.provider.unwrap_or_default(),
        ..Options::default()
    })?;
    for run in 0..runs {
        let started = Instant::now();
        let (mut last, mut steps) = (started, Vec::new());
        let output = pipeline.generate(&request, &mut |event| {
            if let Event::Stage { .. } = event {
                last = Instant::now();
            }
            if let Event::Step { .. } = event {
                steps.push(last.elapsed().as_secs_f64());
                last = Instant::now();
            }
            Control::Continue
        })?;
        let line = serde_json::json!({
            "run": run,
            "seconds": output.seconds,
            "steps": steps,
            "total": started.elapsed().as_secs_f64(),
        });
        println!("{line}");
        if run + 1 == runs {
            save(&output, latents.as_deref(), &path)?;
        }
    }
    Ok(())
}

fn save(
    output: &tronie::Output,
    latents: Option<&Path>,
    request: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = latents {
        output.handoff.save(path, &output.request)?.publish()?;
    }
    for (i, picture) in output.pictures.iter().enumerate() {
        picture.save(request.with_extension(format!("{i}.png")))?;
    }
    Ok(())
}
