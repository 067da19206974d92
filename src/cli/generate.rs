//! `tronie generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::args::GenerateArgs;
use super::bars::Bars;
use super::console::{print, say};
use crate::error::{Error, Result};
use crate::files::{Pending, check_writable, read_input, write_pending};
use crate::image::{is_png, read_request, write_png};
use crate::memory::peak_resident;
use crate::pipeline::{LatentHandoff, Options, Output, Pipeline, random_seed};
use crate::progress::{Cancel, Stage};
use crate::request::{ImagePrompt, Request};

/// A request is a page of text.
const MAX_REQUEST_BYTES: u64 = 1 << 20;
/// Names are made before the batch size is checked; more than this many are not needed for the refusal.
const MAX_NUMBERED: usize = 1024;

pub(super) fn generate(args: &GenerateArgs) -> Result<()> {
    let started = Instant::now();
    let mut request = gather(args)?;
    // Saved latents bring the rest of their request: catalogue, provider, seed, batch.
    let saved = request
        .latents_in
        .as_deref()
        .map(LatentHandoff::load_request)
        .transpose()?;
    let mut whole = saved.map_or_else(|| request.clone(), |saved| saved.overridden_by(&request));
    if whole.seed.is_none() {
        request.seed = Some(random_seed().into());
        whole.seed.clone_from(&request.seed);
    }
    let targets = Targets::of(&whole);
    targets.check(&whole)?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = Pipeline::open(Options {
        models: whole.models,
        ort_lib: whole.ort_lib,
        provider: whole.provider.unwrap_or_default(),
        threads: whole.threads,
        expansions: None,
        cancel,
        profiles: None,
    })?;
    if whole.model.is_none()
        && let Some(name) = pipeline.catalogue().default_model()
    {
        say(&format!("no --model: painting with {name}"));
    }
    let mut bars = Bars::new();
    let result = pipeline.generate(&request, &mut |event| bars.show(&event));
    bars.clear();
    let mut output = result?;
    let writing = Instant::now();
    let files = targets.write(&output)?;
    *output.seconds.entry(Stage::Write).or_default() += writing.elapsed().as_secs_f64();
    let seconds = started.elapsed().as_secs_f64();
    if whole.json == Some(true) {
        return print(&summary(&output, &files, &pipeline, seconds).to_string());
    }
    for file in &files {
        say(&format!("wrote {}", file.display()));
    }
    say(&format!("{seconds:.1} s"));
    Ok(())
}

/// The flags over the request of `--request`, if there is one.
fn gather(args: &GenerateArgs) -> Result<Request> {
    let flags = args.to_request();
    let mut prompts = flags.image_prompts.iter().flatten();
    prompts.try_for_each(ImagePrompt::check_files)?;
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
        let bytes = read_input(origin, MAX_REQUEST_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|e| Error::Input {
            path: origin.clone(),
            reason: format!("is neither a picture made by tronie nor JSON: {e}"),
        })?;
        Request::from_json(&text, origin)?
    };
    Ok(base.overridden_by(&flags))
}

/// The first Ctrl-C stops the run inside its step; the second ends the process at once.
pub(super) fn stop_on_ctrl_c(cancel: &Cancel) -> Result<()> {
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

/// Where the results of a run go.
struct Targets {
    pictures: Vec<PathBuf>,
    latents: Option<PathBuf>,
}

impl Targets {
    fn of(request: &Request) -> Self {
        let count = if request.stop_at.is_some() {
            0
        } else {
            request.pictures()
        };
        let first = request.output.clone().unwrap_or_else(|| {
            let model = request.model.as_deref().map_or("tronie", title);
            let seed = request.seed.as_ref().and_then(|s| s.all().first());
            Path::new("out").join(format!("{model}-{}.png", seed.copied().unwrap_or_default()))
        });
        let pictures = match count {
            1 => vec![first],
            _ => (0..count.min(MAX_NUMBERED))
                .map(|i| numbered(&first, i))
                .collect(),
        };
        Self {
            pictures,
            latents: request.latents_out.clone(),
        }
    }

    /// Finds out before the work, not after it, that a result cannot be written.
    fn check(&self, request: &Request) -> Result<()> {
        if request.stop_at.is_some() && self.latents.is_none() {
            let reason = "needs --latents-out FILE, or the work would be lost";
            return Err(Error::request("stop-at", reason));
        }
        if let Some(path) = &request.output {
            let png = path
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("png"));
            if !png {
                let reason = format!("{} does not end in .png", path.display());
                return Err(Error::request("output", reason));
            }
        }
        if self
            .latents
            .as_ref()
            .is_some_and(|latents| self.pictures.contains(latents))
        {
            return Err(Error::request(
                "latents-out",
                "is the same file as a picture of this run",
            ));
        }
        self.pictures
            .iter()
            .chain(&self.latents)
            .try_for_each(|target| check_writable(target))
    }

    /// Writes everything, then puts everything in place.
    fn write(&self, output: &Output) -> Result<Vec<PathBuf>> {
        let mut pending: Vec<(PathBuf, Pending)> = Vec::new();
        for (picture, path) in output.pictures.iter().zip(&self.pictures) {
            let png = write_pending(path, |to| write_png(to, picture, &output.request))?;
            pending.push((path.clone(), png));
        }
        if let Some(path) = &self.latents {
            pending.push((path.clone(), output.handoff.save(path, &output.request)?));
        }
        let mut files = Vec::new();
        for (path, file) in pending {
            file.publish()?;
            files.push(path);
        }
        Ok(files)
    }
}

/// What pictures of a model are called: its name, or that of its file.
fn title(model: &str) -> &str {
    let name = Path::new(model).file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or(model);
    name.strip_suffix(".safetensors").unwrap_or(name)
}

/// `a/b.png` to `a/b-3.png`.
fn numbered(target: &Path, i: usize) -> PathBuf {
    let mut name = target.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{i}.png"));
    target.with_file_name(name)
}

fn summary(
    output: &Output,
    files: &[PathBuf],
    pipeline: &Pipeline,
    seconds: f64,
) -> serde_json::Value {
    json!({
        "files": files.iter().map(|f| f.to_string_lossy()).collect::<Vec<_>>(),
        "request": output.request,
        "next-step": output.handoff.next_step,
        "provider": pipeline.runtime().provider(),
        "library": pipeline.runtime().library().path().to_string_lossy(),
        "seconds": output.seconds,
        "total-seconds": seconds,
        "peak-memory-bytes": peak_resident(),
    })
}
