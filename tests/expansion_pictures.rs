//! A picture from an f16 checkpoint is the same to the last bit whether its weights are expanded on disk or in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use tempfile::TempDir;
use tronie::memory::MemoryMode;
use tronie::progress::Stage;
use tronie::weights::ExpansionCache;
use tronie::{Cancel, Control, Error, Event, Options, Output, Pipeline, Request};

fn pipeline(cache: ExpansionCache, cancel: Cancel) -> Pipeline {
    Pipeline::open(Options {
        models: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/models.yaml")),
        expansions: Some(cache),
        cancel,
        ..Options::default()
    })
    .unwrap()
}

fn request() -> Request {
    Request {
        prompt: "a sailor".into(),
        model: Some("tiny".into()),
        refiner: Some("tiny-refiner".into()),
        refine_at: Some(0.5),
        steps: Some(4),
        seed: Some(3.into()),
        // Not what the free memory allows: that may change between two runs.
        memory: Some(MemoryMode::Balanced),
        ..Request::default()
    }
}

/// The run's result, and what was expanded in it.
fn paint(cache: &ExpansionCache) -> (Output, Vec<String>) {
    let mut expanded = Vec::new();
    let pipeline = pipeline(cache.clone(), Cancel::default());
    let output = pipeline.generate(&request(), &mut |event| {
        if let Event::Stage { stage, what } = event
            && stage == Stage::Expand
        {
            expanded.push(what.to_owned());
        }
        Control::Continue
    });
    (output.unwrap(), expanded)
}

#[test]
fn the_picture_is_the_same_with_and_without() {
    let folder = TempDir::new().unwrap();
    let cache = ExpansionCache::at(folder.path()).with_smallest(1);
    let (memory, none) = paint(&ExpansionCache::off());
    assert_eq!(none, [""; 0]);
    let (first, made) = paint(&cache);
    let (second, again) = paint(&cache);
    for (output, label) in [(&first, "made"), (&second, "found")] {
        assert!(output.handoff.latents == memory.handoff.latents, "{label}");
        assert!(output.pictures == memory.pictures, "{label}");
    }
    // Keys and values come out of the UNet's file, so the UNet finds it expanded.
    let parts = [
        "text_encoder of tiny ",
        "text_encoder_2 of tiny ",
        "kv of tiny ",
        "text_encoder_2 of tiny-refiner ",
        "kv of tiny-refiner ",
        "vae_decoder of tiny-refiner ",
    ];
    assert_eq!(made.len(), parts.len(), "{made:?}");
    for (what, part) in made.iter().zip(parts) {
        let place = format!("in {}", folder.path().display());
        assert!(what.starts_with(part) && what.contains(&place), "{what}");
    }
    assert_eq!(again, [""; 0]);
    assert!(first.seconds.contains_key(&Stage::Expand));
    assert_eq!(cache.entries().unwrap().len(), parts.len());
}

#[test]
fn a_run_that_is_stopped_while_it_expands_leaves_no_expansion() {
    let folder = TempDir::new().unwrap();
    let cache = ExpansionCache::at(folder.path()).with_smallest(1);
    let cancel = Cancel::default();
    let outcome = pipeline(cache.clone(), cancel.clone()).generate(&request(), &mut |event| {
        if let Event::Stage {
            stage: Stage::Expand,
            ..
        } = event
        {
            cancel.cancel();
        }
        Control::Continue
    });
    assert!(matches!(outcome, Err(Error::Cancelled { step: 0 })));
    assert!(cache.entries().unwrap().is_empty());
    assert_eq!(cache.unfinished_bytes(), 0);
}
