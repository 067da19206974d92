//! `tronie bench`: a process a configuration, their reports as one table or one JSON document.

mod process;
mod quality;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use image::RgbImage;
use serde::Serialize;

pub(super) use process::job;

use super::args::BenchArgs;
use super::console::{print, say};
use super::generate::stop_on_ctrl_c;
use crate::bench::{Job, Measured};
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::image::{Difference, difference};
use crate::memory::MemoryMode;
use crate::progress::Cancel;
use crate::provider::Provider;
use crate::request::Request;
use crate::runtime;
use process::Report;

/// What is painted: the same in every run of every machine.
const PROMPT: &str = "a tronie of an old sailor with a red cap, oil on panel";
const SEED: u64 = 1;
const STEPS: usize = 4;
/// Where the refiner takes over unless told otherwise, so that both networks have steps to measure.
const REFINE_AT: f64 = 0.5;

/// What `--json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    version: &'static str,
    library: PathBuf,
    request: Request,
    runs: usize,
    reference: Option<Configuration>,
    rows: Vec<Row>,
}

/// What is compared with each other.
#[derive(Clone, Copy, Serialize)]
struct Configuration {
    provider: Provider,
    memory: MemoryMode,
}

/// One configuration's outcome.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    configuration: Configuration,
    reason: Option<String>,
    difference: Option<Difference>,
    measured: Option<Box<Measured>>,
    #[serde(skip)]
    picture: Option<RgbImage>,
    /// The exit status of a process with only this row.
    #[serde(skip)]
    code: u8,
}

/// Measures every configuration that is asked for. The status is that of the first one when none could be measured.
pub(super) fn bench(args: &BenchArgs) -> Result<ExitCode> {
    if let Some(folder) = &args.quality {
        return quality::run(args, folder).map(|()| ExitCode::SUCCESS);
    }
    let library = runtime::find_library(args.catalogue.ort_lib.as_deref())?;
    let catalogue = Hub::from_env()?.catalogue(args.catalogue.models.as_deref())?;
    let wanted = measured(args);
    checkpoint::open(&catalogue, &wanted)?;
    let resolved = wanted.resolve(&catalogue, SEED)?;
    if resolved.steps == 0 {
        return Err(Error::request("steps", "must be at least 1"));
    }
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let mut rows = Vec::new();
    for configuration in configurations(args) {
        let Configuration { provider, memory } = configuration;
        say(&format!("measuring {provider}, {memory}"));
        let job = Job {
            request: Request {
                provider: Some(provider),
                memory: Some(memory),
                models: args.catalogue.models.clone(),
                ..measured(args)
            },
            runs: usize::from(args.runs),
            times_only: args.times_only,
            only_if_it_fits: args.memory.is_empty(),
        };
        rows.push(row(configuration, process::run(&job, &cancel)?));
    }
    let reference = compare(&mut rows);
    let failed = rows.iter().all(|r| r.measured.is_none());
    let status = rows.first().filter(|_| failed).map_or(0, |r| r.code);
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        library,
        request: resolved.request,
        runs: usize::from(args.runs),
        reference,
        rows,
    };
    if args.json {
        let json = serde_json::to_string_pretty(&document).map_err(|e| Error::Output {
            path: PathBuf::from("stdout"),
            source: e.into(),
        })?;
        print(&json)?;
    } else {
        print(&table::of(&document, args.operators))?;
    }
    Ok(ExitCode::from(status))
}

/// The request that every configuration runs.
fn measured(args: &BenchArgs) -> Request {
    Request {
        prompt: PROMPT.into(),
        seed: Some(SEED.into()),
        steps: Some(args.steps.unwrap_or(STEPS)),
        ..request(args)
    }
}

/// What the flags say of every picture.
fn request(args: &BenchArgs) -> Request {
    Request {
        model: args.model.clone(),
        width: args.size.map(|s| s.width),
        height: args.size.map(|s| s.height),
        guidance: args.guidance,
        refiner: args.refiner.clone(),
        refine_at: args
            .refiner
            .as_ref()
            .map(|_| args.refine_at.unwrap_or(REFINE_AT)),
        image_prompts: args.image_prompts.clone(),
        ort_lib: args.catalogue.ort_lib.clone(),
        threads: args.threads.map(usize::from),
        ..Request::default()
    }
}

/// Every provider with every memory mode, as far as they are asked for.
fn configurations(args: &BenchArgs) -> Vec<Configuration> {
    let modes = |provider| match (args.memory.is_empty(), provider) {
        (false, _) => args.memory.clone(),
        (true, Provider::Cpu) => MemoryMode::ALL.to_vec(),
        (true, _) => vec![MemoryMode::Balanced],
    };
    let pairs = args.provider.iter().flat_map(|&provider| {
        let modes = modes(provider).into_iter();
        modes.map(move |memory| Configuration { provider, memory })
    });
    pairs.collect()
}

fn row(configuration: Configuration, report: (Report, Option<RgbImage>)) -> Row {
    let (measured, reason, code) = match report.0 {
        Report::Measured(measured) => (Some(measured), None, 0),
        Report::Failed { code, reason } => (None, Some(reason), code),
    };
    Row {
        configuration,
        reason,
        difference: None,
        measured,
        picture: report.1,
        code,
    }
}

/// Compares every picture with the reference's, the first row on the processor.
fn compare(rows: &mut [Row]) -> Option<Configuration> {
    let on_processor = |r: &&Row| r.configuration.provider == Provider::Cpu;
    let mut measured = rows.iter().filter(|r| r.picture.is_some());
    let reference = measured.find(on_processor)?;
    let configuration = reference.configuration;
    let picture = reference.picture.clone()?;
    for row in rows {
        row.difference = row.picture.as_ref().and_then(|p| difference(&picture, p));
    }
    Some(configuration)
}
