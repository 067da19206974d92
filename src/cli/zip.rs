//! `tronie lora zip`: a content and a style LoRA merged into one.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::args::LoraZipArgs;
use super::bars::Bars;
use super::console::{print, say};
use super::generate::stop_on_ctrl_c;
use crate::error::{Error, Result};
use crate::files::{check_writable, write_pending};
use crate::lora::{Mergers, Terms};
use crate::memory::peak_resident;
use crate::model_file::ModelFile;
use crate::pipeline::{Lost, Options, Pipeline, Zipped, Zipping};
use crate::progress::Cancel;
use crate::request::Request;

pub(super) fn zip(args: &LoraZipArgs) -> Result<()> {
    let started = Instant::now();
    check(args)?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = Pipeline::open(Options {
        provider: args.provider,
        threads: args.threads.map(usize::from),
        cancel,
        ..args.catalogue.options()
    })?;
    let zipping = zipping(args);
    let mut bars = Bars::new();
    let made = make(args, &pipeline, &zipping, &mut bars);
    bars.clear();
    let (zipped, lost) = made?;
    if args.json {
        let lost = lost.map(|[content, style]| {
            let shares = |lost: Lost| json!({"zipped": lost.zipped, "added": lost.added});
            json!({"content": shares(content), "style": shares(style)})
        });
        let json = json!({
            "output": args.output,
            "zipped": zipped.mergers.len(),
            "added": zipped.added,
            "lost": lost,
            "total-seconds": started.elapsed().as_secs_f64(),
            "peak-memory-bytes": peak_resident(),
        });
        return print(&json.to_string());
    }
    say(&format!(
        "wrote {}: {} attention layers with mergers, {} other layers added up; use it with --lora",
        args.output.display(),
        zipped.mergers.len(),
        zipped.added
    ));
    for (side, lost) in ["content", "style"].iter().zip(lost.iter().flatten()) {
        say(&format!(
            "{side}: loses {:.3} of its effect; added up plainly it would lose {:.3}",
            lost.zipped, lost.added
        ));
    }
    Ok(())
}

/// Makes the files, measures, and puts them in their places.
fn make(
    args: &LoraZipArgs,
    pipeline: &Pipeline,
    zipping: &Zipping,
    bars: &mut Bars,
) -> Result<(Zipped, Option<[Lost; 2]>)> {
    let mut show = |event: crate::progress::Event<'_>| bars.show(&event);
    let zipped = match &args.mergers {
        Some(file) => pipeline.zip_with(zipping, &ModelFile::from(file.as_path()), &mut show)?,
        None => pipeline.zip(zipping, &mut show)?,
    };
    let pending = write_pending(&args.output, |to| to.write_all(&zipped.lora))?;
    let mergers = match &args.save_mergers {
        None => None,
        Some(file) => {
            let content = Mergers::file(&zipped.mergers)?;
            Some(write_pending(file, |to| to.write_all(&content))?)
        }
    };
    let lost = if args.measure {
        let later = Zipping {
            request: Request {
                seed: Some((seed(args) + 1).into()),
                ..zipping.request.clone()
            },
            ..zipping.clone()
        };
        let merged = pending.path().to_string_lossy();
        Some(pipeline.zip_lost(&later, &merged, &mut show)?)
    } else {
        None
    };
    if let Some(mergers) = mergers {
        mergers.publish()?;
    }
    pending.publish()?;
    Ok((zipped, lost))
}

/// What cannot work is refused before anything is computed.
fn check(args: &LoraZipArgs) -> Result<()> {
    let painting = args.prompt_content.is_some()
        || args.prompt_style.is_some()
        || args.steps.is_some()
        || args.guidance.is_some()
        || args.width.is_some()
        || args.height.is_some()
        || args.batch.is_some()
        || args.seed.is_some();
    if args.mergers.is_some() && painting && !args.measure {
        let reason = "with mergers from a file nothing is painted: leave prompts, steps, size, batch, guidance and \
                      seed out, or add --measure";
        return Err(Error::request("mergers", reason));
    }
    let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let output = whole(&args.output);
    let mut read = vec![Path::new(&args.content), Path::new(&args.style)];
    read.extend(args.mergers.as_deref());
    for (field, written) in [
        ("output", Some(&args.output)),
        ("save-mergers", args.save_mergers.as_ref()),
    ] {
        let Some(written) = written else { continue };
        if read.iter().any(|read| whole(read) == whole(written)) {
            let reason = format!(
                "{} is one of the files to merge: name another",
                written.display()
            );
            return Err(Error::request(field, reason));
        }
        check_writable(written)?;
    }
    if args
        .save_mergers
        .as_deref()
        .is_some_and(|file| whole(file) == output)
    {
        return Err(Error::request(
            "save-mergers",
            "is --output too: name another file",
        ));
    }
    Ok(())
}

fn seed(args: &LoraZipArgs) -> u64 {
    args.seed.unwrap_or(0)
}

fn zipping(args: &LoraZipArgs) -> Zipping {
    let usual = Terms::default();
    Zipping {
        request: Request {
            model: args.model.clone(),
            steps: args.steps,
            guidance: args.guidance,
            width: args.width,
            height: args.height,
            batch: args.batch,
            seed: Some(seed(args).into()),
            memory: args.memory,
            ..Request::default()
        },
        loras: [args.content.clone(), args.style.clone()],
        prompts: [&args.prompt_content, &args.prompt_style].map(|p| p.clone().unwrap_or_default()),
        terms: Terms {
            ridge: args.ridge.unwrap_or(usual.ridge),
            similarity: args.similarity.unwrap_or(usual.similarity),
        },
    }
}
