//! `tronie bench --quality`: what a judge finds in painted pictures, as a table or as JSON.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::request;
use super::table::aligned;
use crate::bench::quality::{Bar, Exam, Measure, examine};
use crate::cli::args::BenchArgs;
use crate::cli::console::{print, say};
use crate::cli::generate::stop_on_ctrl_c;
use crate::error::{Error, Result};
use crate::memory::MemoryMode;
use crate::pipeline::{Options, Pipeline};
use crate::progress::{Cancel, Control, Event};
use crate::request::Request;

/// What `--json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document<'a> {
    version: &'static str,
    folder: &'a Path,
    model: Option<String>,
    seconds: f64,
    measures: &'a [Measure],
}

/// Paints and judges what `folder` asks; a missed bar is printed, not an error.
pub(super) fn run(args: &BenchArgs, folder: &Path) -> Result<()> {
    let started = Instant::now();
    let (pipeline, exam) = (opened(args)?, exam(args, folder)?);
    let mut heard = BTreeSet::new();
    let measures = examine(
        &pipeline,
        &exam,
        &mut |subject, count| say(&format!("{subject}: {count} pictures")),
        &mut |event| {
            if let Event::Warning(text) = event
                && heard.insert((*text).to_owned())
            {
                say(&format!("warning: {text}"));
            }
            Control::Continue
        },
    )?;
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        folder,
        model: exam.request.model_name(pipeline.catalogue()).ok(),
        seconds: started.elapsed().as_secs_f64(),
        measures: &measures,
    };
    if args.json {
        let json = serde_json::to_string_pretty(&document).map_err(|e| Error::Output {
            path: PathBuf::from("stdout"),
            source: e.into(),
        })?;
        return print(&json);
    }
    print(&table(&measures))?;
    say(&format!("{:.0} s", document.seconds));
    Ok(())
}

fn opened(args: &BenchArgs) -> Result<Pipeline> {
    let [provider] = args.provider[..] else {
        let reason = "--quality paints on one provider; name one";
        return Err(Error::request("provider", reason));
    };
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    Pipeline::open(Options {
        provider,
        threads: args.threads.map(usize::from),
        cancel,
        ..args.catalogue.options()
    })
}

fn exam(args: &BenchArgs, folder: &Path) -> Result<Exam> {
    let memory = match args.memory[..] {
        [] => MemoryMode::Fast,
        [memory] => memory,
        _ => {
            let reason = "--quality paints in one memory mode; name one";
            return Err(Error::request("memory", reason));
        }
    };
    Ok(Exam {
        folder: folder.to_owned(),
        request: Request {
            memory: Some(memory),
            steps: args.steps,
            seed: None,
            ..request(args)
        },
        only: args.quality_only.clone(),
        count: args.quality_count,
    })
}

fn table(measures: &[Measure]) -> String {
    let head = ["pictures", "measure", "n", "value", "bar", ""].map(str::to_owned);
    let rows = measures.iter().map(|measure| {
        let bar = match measure.bar {
            Some(Bar::AtLeast(bar)) => format!(">= {bar:.2}"),
            Some(Bar::AtMost(bar)) => format!("<= {bar:.2}"),
            None => String::new(),
        };
        let met = match measure.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        [
            measure.subject.to_string(),
            measure.what.clone(),
            measure.count.to_string(),
            format!("{:.4}", measure.value),
            bar,
            met.to_owned(),
        ]
    });
    aligned(&std::iter::once(head).chain(rows).collect::<Vec<_>>()).join("\n")
}
