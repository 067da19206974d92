//! How fast and how large a request is on this machine: one configuration, measured in this process.
//!
//! The request runs through the same pipeline as any other; times come from its events, memory from the kernel. Then one
//! more step and one more decoding run with ONNX Runtime's profiler, which tells the operators, their shapes (and so the
//! work that was done) and the provider of each. A process measures one configuration, because memory that one leaves
//! behind would be counted for the next.

mod flops;
mod limit;
mod operators;
pub mod quality;
mod recorder;

use std::collections::BTreeMap;
use std::path::Path;

use image::RgbImage;
use serde::{Deserialize, Serialize};

pub use flops::Counter;
pub use operators::{FallenBack, OperatorTime};
pub use recorder::Lap;

use crate::error::{Error, Result};
use crate::memory::{self, Watch};
use crate::pipeline::{Options, Pipeline};
use crate::plan::names;
use crate::progress::{Cancel, Control, Stage};
use crate::request::Request;
use crate::runtime::Runtime;
use operators::Work;
use recorder::{Recorder, StepTime};

/// What to measure: a request with provider, memory mode, threads, library and catalogue.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Job {
    /// What to paint, and how.
    pub request: Request,
    /// How often the request runs before the profiled run, at least 1.
    pub runs: usize,
    /// Whether the profiled run and the limit are left out.
    pub times_only: bool,
    /// Whether a memory mode for which this machine has too little free memory is left out.
    pub only_if_it_fits: bool,
}

/// What was measured of one configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measured {
    /// Seconds of building all sessions, of the first run.
    pub load_seconds: f64,
    /// Seconds of running text encoders and projection, the median of the runs.
    pub text_seconds: f64,
    /// The denoising networks, in the order in which they run.
    pub unets: Vec<UnetTimes>,
    /// The decoder.
    pub decoder: DecoderTimes,
    /// Seconds of the whole request, of the first run.
    pub total_seconds: f64,
    /// Floating-point operations per second of a matrix product of SDXL's size on the same provider and threads; `None`
    /// when only times were measured.
    pub limit_flops_per_second: Option<f64>,
    /// The highest anonymous memory of all runs, bytes; `None` where the system does not tell.
    pub peak_anonymous_bytes: Option<u64>,
    /// The highest anonymous memory while denoising, bytes; `None` where the system does not tell.
    pub denoise_anonymous_bytes: Option<u64>,
    /// The highest resident memory of all runs, pages of mapped weights included, bytes; `None` where the system does
    /// not tell.
    pub peak_resident_bytes: Option<u64>,
    /// The stages of the first run, one after the other.
    pub stages: Vec<Lap>,
    /// Nodes that ran on the processor although another provider was asked for.
    pub fallen_back: Vec<FallenBack>,
    /// Time and work by network, operator and provider, of the profiled run.
    pub operators: Vec<OperatorTime>,
}

/// A denoising network's times.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct UnetTimes {
    /// The catalogue's name of its model.
    pub model: String,
    /// Seconds of the first step of the first run.
    pub first_step_seconds: f64,
    /// The median of the steps that are not the first of their run; `None` when there is no other.
    pub step_seconds: Option<f64>,
    /// The seconds that `step_seconds` is the median of.
    pub samples: Vec<f64>,
    /// The share of a step that is not inside ONNX Runtime, `0.0..=1.0`, over the same steps; `None` as `step_seconds`.
    pub outside_runtime_share: Option<f64>,
    /// The work of a step, and its rate by `step_seconds`.
    #[serde(flatten)]
    pub rate: Rate,
}

/// The decoder's times.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DecoderTimes {
    /// Seconds from latents to the picture, the median of the runs.
    pub seconds: f64,
    /// The seconds that `seconds` is the median of.
    pub samples: Vec<f64>,
    /// The work of one decoding, of all its tiles, and its rate.
    #[serde(flatten)]
    pub rate: Rate,
}

/// Work and how fast it was done. `None` when only times were measured, or the shapes of an operator do not tell.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rate {
    /// Floating-point operations.
    pub flops: Option<u64>,
    /// Operations per second.
    pub flops_per_second: Option<f64>,
    /// Share of the limit that they are.
    pub share_of_limit: Option<f64>,
}

impl Rate {
    fn new(flops: Option<u64>, seconds: Option<f64>, limit: Option<f64>) -> Self {
        let flops_per_second = flops.zip(seconds).map(|(f, s)| f as f64 / s);
        Self {
            flops,
            flops_per_second,
            share_of_limit: flops_per_second.zip(limit).map(|(f, limit)| f / limit),
        }
    }
}

/// Measures one configuration, and returns the picture that it painted. Profiles are left in `folder`, which must be
/// empty.
///
/// # Errors
/// Those of [`Pipeline::open`] and [`Pipeline::generate`]; [`Error::Request`] for `memory` when a mode does not fit and
/// the job asks that it does.
pub fn measure(job: &Job, folder: &Path, cancel: &Cancel) -> Result<(Measured, RgbImage)> {
    let watch = Watch::start();
    let pipeline = Pipeline::open(options(&job.request, cancel))?;
    if job.only_if_it_fits {
        check_fit(&pipeline, &job.request)?;
    }
    let mut runs = Vec::new();
    let mut picture = None;
    for _ in 0..job.runs.max(1) {
        let mut recorder = Recorder::new(watch.as_ref());
        let output = pipeline.generate(&job.request, &mut |event| {
            recorder.hear(&event, pipeline.runtime().busy());
            Control::Continue
        })?;
        recorder.finish();
        runs.push(recorder);
        picture = picture.or(output.pictures.into_iter().next());
    }
    let peak_resident_bytes = memory::peak_resident();
    drop(pipeline);
    let (work, limit) = if job.times_only {
        (Work::default(), None)
    } else {
        let work = profile(job, folder, cancel)?;
        (work, Some(limit(&job.request, cancel)?))
    };
    let picture = picture.ok_or_else(|| {
        Error::request("stop-at", "leaves no picture; a benchmark runs to the end")
    })?;
    let mut measured = summary(&runs, work, limit)?;
    measured.peak_resident_bytes = peak_resident_bytes;
    Ok((measured, picture))
}

/// The surroundings that a request names.
fn options(request: &Request, cancel: &Cancel) -> Options {
    Options {
        models: request.models.clone(),
        ort_lib: request.ort_lib.clone(),
        provider: request.provider.unwrap_or_default(),
        threads: request.threads,
        cancel: cancel.clone(),
        profiles: None,
        expansions: None,
    }
}

/// Refuses a memory mode that would not fit into what is free.
fn check_fit(pipeline: &Pipeline, request: &Request) -> Result<()> {
    let (Some(mode), Some(available)) = (request.memory, memory::available()) else {
        return Ok(());
    };
    let resolved = pipeline.resolve(request, 0)?;
    let need = pipeline
        .need(&resolved, &mut |_| Control::Continue)?
        .of(mode);
    if need <= available {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let reason = format!(
        "{mode} wants {:.1} GiB and {:.1} are free; name it with --memory {mode} to measure it all the same",
        gib(need),
        gib(available)
    );
    Err(Error::request("memory", reason))
}

/// The limit for the surroundings that a request names.
fn limit(request: &Request, cancel: &Cancel) -> Result<f64> {
    let options = options(request, cancel);
    let library = options.ort_lib.as_deref();
    let runtime = Runtime::open(library, options.provider, options.threads, options.cancel)?;
    limit::measure(&runtime)
}

/// Runs the request with the profiler: one step of each network and a decoding.
fn profile(job: &Job, folder: &Path, cancel: &Cancel) -> Result<Work> {
    let mut request = job.request.clone();
    request.steps = Some(1);
    if request.refiner.is_some() {
        (request.steps, request.refine_at) = (Some(2), Some(0.5));
    }
    let pipeline = Pipeline::open(Options {
        profiles: Some(folder.to_owned()),
        ..options(&request, cancel)
    })?;
    let mut recorder = Recorder::new(None);
    pipeline.generate(&request, &mut |event| {
        recorder.hear(&event, pipeline.runtime().busy());
        Control::Continue
    })?;
    recorder.finish();
    let loads = recorder.laps.iter().filter(|l| l.stage == Stage::Load);
    let networks = loads.map(|l| l.what.clone()).collect::<Vec<_>>();
    Work::read(pipeline, &networks, folder)
}

/// Puts times, work and limit together.
fn summary(runs: &[Recorder<'_>], work: Work, limit: Option<f64>) -> Result<Measured> {
    let all = |stage| {
        runs.iter()
            .map(move |r| seconds_of(&r.laps, stage))
            .collect()
    };
    let decoding: Vec<f64> = all(Stage::Decode);
    let (Some(first), Some(text), Some(decode)) = (
        runs.first(),
        median(all(Stage::Text)),
        median(decoding.clone()),
    ) else {
        return Err(Error::request("runs", "must be at least 1"));
    };
    let laps = || runs.iter().flat_map(|r| &r.laps);
    let peak = |stage: Option<Stage>| {
        let of_stage = laps().filter(|l| stage.is_none_or(|s| s == l.stage));
        of_stage.filter_map(|l| l.anonymous_bytes_peak).max()
    };
    let flops = work.flops_of(names::VAE_DECODER, None);
    Ok(Measured {
        load_seconds: seconds_of(&first.laps, Stage::Load),
        text_seconds: text,
        unets: unets(runs, &work, limit),
        decoder: DecoderTimes {
            seconds: decode,
            samples: decoding,
            rate: Rate::new(flops, Some(decode), limit),
        },
        total_seconds: first.laps.iter().map(|l| l.seconds).sum(),
        limit_flops_per_second: limit,
        peak_anonymous_bytes: peak(None),
        denoise_anonymous_bytes: peak(Some(Stage::Denoise)),
        peak_resident_bytes: None,
        stages: first.laps.clone(),
        fallen_back: work.fallen_back,
        operators: work.operators,
    })
}

fn unets(runs: &[Recorder<'_>], work: &Work, limit: Option<f64>) -> Vec<UnetTimes> {
    let mut order = Vec::<&str>::new();
    let mut by_model = BTreeMap::<&str, Vec<&StepTime>>::new();
    for step in runs.iter().flat_map(|r| &r.steps) {
        if !order.contains(&step.model.as_str()) {
            order.push(&step.model);
        }
        by_model.entry(&step.model).or_default().push(step);
    }
    let times = order.into_iter().filter_map(|model| {
        let steps = by_model.get(model)?;
        let steady = steps.iter().filter(|s| !s.first).collect::<Vec<_>>();
        let whole = steady.iter().map(|s| s.whole.as_secs_f64());
        let samples = whole.collect::<Vec<_>>();
        let step_seconds = median(samples.clone());
        let inside = steady.iter().map(|s| s.inside.as_secs_f64()).sum::<f64>();
        let flops = [names::UNET, names::UNET_IMAGE]
            .into_iter()
            .find_map(|unet| work.flops_of(unet, Some(model)));
        let outside = 1.0 - inside / samples.iter().sum::<f64>();
        Some(UnetTimes {
            model: model.to_owned(),
            first_step_seconds: steps.first()?.whole.as_secs_f64(),
            step_seconds,
            outside_runtime_share: step_seconds.map(|_| outside),
            rate: Rate::new(flops, step_seconds, limit),
            samples,
        })
    });
    times.collect()
}

fn seconds_of(laps: &[Lap], stage: Stage) -> f64 {
    let of_stage = laps.iter().filter(|l| l.stage == stage);
    of_stage.map(|l| l.seconds).sum()
}

/// The middle value, or the mean of the middle two; `None` of nothing.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (upper, lower) = (values.len() / 2, values.len().checked_sub(1)? / 2);
    Some(f64::midpoint(*values.get(lower)?, *values.get(upper)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 3.0, 4.0]), Some(3.5));
    }
}
