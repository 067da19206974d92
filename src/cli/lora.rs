//! `tronie lora`: what a LoRA changes in a model; `tronie lora merge`: an overlay of what several make of it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::json;

use super::args::{CatalogueArgs, LoraArgs, LoraCommand, LoraMergeArgs, LoraShowArgs};
use super::bars::Bars;
use super::console::{print, say};
use super::generate::stop_on_ctrl_c;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::files::check_writable;
use crate::memory::peak_resident;
use crate::pipeline::{LoraReport, Options, Pipeline};
use crate::progress::Cancel;
use crate::request::{LoraSet, LoraUse, Request};
use crate::weights::readable_size;

/// Trigger words that are printed.
const SHOWN_WORDS: usize = 12;
/// Training facts that are printed: keys of kohya's sd-scripts and of Stability's ModelSpec, and what to call them.
const FACTS: &[(&str, &str)] = &[
    ("modelspec.title", "title"),
    ("ss_output_name", "name"),
    ("modelspec.author", "author"),
    ("modelspec.license", "licence"),
    ("modelspec.architecture", "architecture"),
    ("ss_base_model_version", "base"),
    ("ss_sd_model_name", "trained on"),
    ("ss_network_module", "network"),
    ("ss_network_args", "network arguments"),
    ("ss_num_train_images", "images"),
    ("ss_resolution", "resolution"),
    ("modelspec.resolution", "resolution"),
    ("ss_num_epochs", "epochs"),
    ("ss_steps", "steps"),
    ("ss_learning_rate", "learning rate"),
    ("ss_clip_skip", "clip skip"),
    ("modelspec.date", "date"),
];

pub(super) fn lora(args: &LoraArgs) -> Result<()> {
    match &args.command {
        Some(LoraCommand::Merge(merge_args)) => merge(merge_args),
        Some(LoraCommand::Zip(zip_args)) => super::zip::zip(zip_args),
        None => show(&args.show),
    }
}

fn open(catalogue: &CatalogueArgs, model: Option<&String>) -> Result<(Pipeline, String)> {
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = Pipeline::open(Options {
        cancel,
        ..catalogue.options()
    })?;
    let named = Request {
        model: model.cloned(),
        ..Request::default()
    };
    checkpoint::open(pipeline.catalogue(), &named)?;
    let model = named.model_name(pipeline.catalogue())?;
    Ok((pipeline, model))
}

fn merge(args: &LoraMergeArgs) -> Result<()> {
    let started = Instant::now();
    check_writable(&args.output)?;
    let (pipeline, model) = open(&args.catalogue, args.model.as_ref())?;
    // The checks of a request that paints.
    let request = Request {
        prompt: "-".into(),
        model: Some(model),
        loras: Some(args.loras.clone()),
        lora_lenient: args.lora_lenient.then_some(true),
        ..Request::default()
    };
    let set: LoraSet = request.resolve(pipeline.catalogue(), 0)?.lora_set();
    let mut bars = Bars::new();
    let merged = pipeline.merge_loras(&set, (&args.output, args.dtype), &mut |event| {
        bars.show(&event)
    });
    bars.clear();
    let (pending, report) = merged?;
    pending.publish()?;
    if args.json {
        let json = json!({
            "output": args.output,
            "model": set.model,
            "loras": set.uses,
            "tensors": report.tensors,
            "bytes": report.bytes,
            "total-seconds": started.elapsed().as_secs_f64(),
            "peak-memory-bytes": peak_resident(),
        });
        return print(&json.to_string());
    }
    let count: usize = report.tensors.values().sum();
    let loras = set.uses.iter().map(LoraUse::to_string);
    say(&format!(
        "wrote {}, {count} tensors of {} with {}, {}: use it with --lora",
        args.output.display(),
        set.model,
        loras.collect::<Vec<_>>().join(", "),
        readable_size(report.bytes)
    ));
    Ok(())
}

fn show(args: &LoraShowArgs) -> Result<()> {
    let lora = args.lora.as_deref();
    let lora = lora.ok_or_else(|| Error::request("lora", "name a LoRA's file"))?;
    let (pipeline, model) = open(&args.catalogue, args.model.as_ref())?;
    let mut bars = Bars::new();
    let report = pipeline.lora_report(&model, lora, &mut |event| bars.show(&event));
    bars.clear();
    let report = report?;
    if args.json {
        let text = serde_json::to_string(&report).map_err(|e| Error::Output {
            path: "stdout".into(),
            source: e.into(),
        })?;
        return print(&text);
    }
    print_report(&report)
}

fn print_report(report: &LoraReport) -> Result<()> {
    print(&format!("{}  {}", report.file.display(), kinds(report)))?;
    for (component, share) in &report.components {
        print(&format!(
            "  {component:<15} {} modules, {:.1} % of its {} parameters, changed by {:.4} of {:.4} ({:.2} %)",
            share.modules,
            percent(share.parameters as f64, share.of as f64),
            share.of,
            share.change,
            share.weights,
            percent(share.change, share.weights),
        ))?;
    }
    let words = report.triggers.iter().map(|words| words.phrase.as_str());
    let words = words.take(SHOWN_WORDS).collect::<Vec<_>>();
    if !words.is_empty() {
        let more = report.triggers.len() - words.len();
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        print(&format!("  words           {}{more}", words.join(", ")))?;
    }
    let facts = FACTS
        .iter()
        .filter_map(|(key, name)| Some((name, report.metadata.get(*key)?)));
    for (name, fact) in facts {
        print(&format!("  {name:<15} {}", fact.escape_debug()))?;
    }
    if !report.unmatched.is_empty() {
        let count = report.unmatched.len();
        print(&format!("  {count} modules do not fit {}", report.model))?;
        for (module, reason) in &report.unmatched {
            print(&format!("    {} {reason}", module.escape_debug()))?;
        }
    }
    Ok(())
}

/// The format and the kinds of changes, such as `kohya: 264 linear of rank 8, alpha 4`.
fn kinds(report: &LoraReport) -> String {
    let mut kinds = BTreeMap::<String, usize>::new();
    for change in &report.changes {
        let dora = if change.dora { " DoRA" } else { "" };
        let rank = change
            .rank
            .map_or(String::new(), |r| format!(" of rank {r}"));
        let alpha = change
            .alpha
            .map_or(String::new(), |a| format!(", alpha {a}"));
        *kinds
            .entry(format!("{}{dora}{rank}{alpha}", change.kind))
            .or_default() += 1;
    }
    let kinds = kinds
        .into_iter()
        .map(|(kind, count)| format!("{count} {kind}"));
    format!(
        "{}: {}",
        report.format,
        kinds.collect::<Vec<_>>().join("; ")
    )
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole == 0.0 {
        0.0
    } else {
        part / whole * 100.0
    }
}
