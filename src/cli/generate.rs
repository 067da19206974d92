//! `tronie generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::args::GenerateArgs;
use super::bars::Bars;
use crate::error::{Error, Result};
use crate::files::{Pending, write_pending};
use crate::image::{is_png, read_request, write_png};
use crate::pipeline::{LatentHandoff, Options, Output, Pipeline};
use crate::progress::{Cancel, Event, Stage};
use crate::request::Request;

pub(super) fn generate(args: &GenerateArgs) -> Result<()> {
    let started = Instant::now();
    let request = gather(args)?;
    check_targets(&request)?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = open(args, &request, cancel)?;
    let mut bars = Bars::new();
    let result = pipeline.generate(&request, &mut |event| bars.show(&event));
    bars.clear();
    let mut output = result?;
    let written = Instant::now();
    let files = write(&output, &request)?;
    *output.seconds.entry(Stage::Write).or_default() += written.elapsed().as_secs_f64();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        println!("{}", summary(&output, &files, &pipeline, seconds));
    } else {
        let mut bars = Bars::new();
        for file in &files {
            bars.show(&Event::Stage {
                stage: Stage::Write,
                what: &file.display().to_string(),
            });
            bars.clear();
            eprintln!("wrote {}", file.display());
        }
        eprintln!("{seconds:.1} s");
    }
    Ok(())
}

/// The flags over the request of `--request`, if there is one.
fn gather(args: &GenerateArgs) -> Result<Request> {
    let flags = args.to_request();
    let Some(origin) = &args.request else {
        if args.prompt.is_none() && args.latents_in.is_none() {
            return Err(Error::request(
                "prompt",
                "is missing; say what to paint, or name --request or --latents-in",
            ));
        }
        return Ok(flags);
    };
    let base = if is_png(origin) {
        read_request(origin)?
    } else {
        let fail = |reason: String| Error::Input {
            path: origin.clone(),
            reason,
        };
        let text = std::fs::read_to_string(origin).map_err(|e| fail(e.to_string()))?;
        Request::from_json(&text, origin)?
    };
    base.overridden_by(&flags)
}

/// Finds out before the work, not after it, that a result cannot be written.
fn check_targets(request: &Request) -> Result<()> {
    for target in request.output.iter().chain(&request.latents_out) {
        write_pending(target, |_| Ok(()))?;
    }
    match &request.output {
        Some(path)
            if path
                .extension()
                .is_none_or(|e| !e.eq_ignore_ascii_case("png")) =>
        {
            Err(Error::request(
                "output",
                format!("{} does not end in .png", path.display()),
            ))
        }
        _ => Ok(()),
    }
}

fn open(args: &GenerateArgs, request: &Request, cancel: Cancel) -> Result<Pipeline> {
    // Saved latents bring the catalogue and provider they were made with.
    let saved = request
        .latents_in
        .as_deref()
        .map(LatentHandoff::load)
        .transpose()?;
    let whole = saved.map_or_else(
        || Ok(request.clone()),
        |(_, saved)| saved.overridden_by(request),
    )?;
    Pipeline::open(Options {
        models: whole.models,
        ort_lib: args.catalogue.ort_lib.clone(),
        provider: whole.provider.unwrap_or_default(),
        threads: args.threads.map(usize::from),
        cancel,
    })
}

/// The first Ctrl-C stops the run inside its step; the second ends the process at once.
fn stop_on_ctrl_c(cancel: &Cancel) -> Result<()> {
    let cancel = cancel.clone();
    ctrlc::set_handler(move || {
        if cancel.is_cancelled() {
            std::process::exit(6);
        }
        cancel.cancel();
    })
    .map_err(|e| Error::Library {
        reason: format!("Ctrl-C cannot be handled: {e}"),
    })
}

/// Writes everything, then puts everything in place.
fn write(output: &Output, request: &Request) -> Result<Vec<PathBuf>> {
    let mut pending: Vec<(PathBuf, Pending)> = Vec::new();
    let target = request
        .output
        .clone()
        .unwrap_or_else(|| default_target(&output.request));
    let count = output.pictures.len();
    for (i, picture) in output.pictures.iter().enumerate() {
        let path = if count == 1 {
            target.clone()
        } else {
            numbered(&target, i)
        };
        let png = write_pending(&path, |to| write_png(to, picture, &output.request))?;
        pending.push((path, png));
    }
    if let Some(path) = &request.latents_out {
        pending.push((path.clone(), output.handoff.save(path, &output.request)?));
    }
    let mut files = Vec::new();
    for (path, file) in pending {
        file.publish()?;
        files.push(path);
    }
    Ok(files)
}

fn default_target(request: &Request) -> PathBuf {
    let model = request.model.as_deref().unwrap_or("tronie");
    Path::new("out").join(format!("{model}-{}.png", request.seed.unwrap_or_default()))
}

/// `a/b.png` to `a/b-3.png`.
fn numbered(target: &Path, i: usize) -> PathBuf {
    let stem = target.file_stem().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!("{stem}-{i}.png"))
}

fn summary(
    output: &Output,
    files: &[PathBuf],
    pipeline: &Pipeline,
    seconds: f64,
) -> serde_json::Value {
    json!({
        "files": files,
        "request": output.request,
        "next-step": output.handoff.next_step,
        "provider": pipeline.runtime().provider(),
        "library": pipeline.runtime().library().path(),
        "seconds": output.seconds,
        "total-seconds": seconds,
        "peak-memory-bytes": peak_memory(),
    })
}

/// Largest resident memory of this process so far, bytes; `None` where the system does not tell.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim()
        .trim_end_matches("kB")
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}
