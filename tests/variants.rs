//! Variants of models in the catalogue, and warnings of requests that a distilled model was not made for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::float_cmp,
    clippy::too_many_lines,
    reason = "numbers that are carried, not computed; tables of refusals"
)]

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tronie::error::Error;
use tronie::manifest::{Catalogue, FileRef};
use tronie::request::{Request, Resolved};
use tronie::schedule::{Prediction, SamplingOptions, Spacing};
use tronie::schedulers::SchedulerKind;
use tronie::{Control, Event, Options, Pipeline};

/// The tiny models' catalogue with more models, in a folder of its own.
struct Varied {
    folder: TempDir,
}

impl Varied {
    fn new(models: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().unwrap();
        let own = root.join("tests/models");
        let text = std::fs::read_to_string(own.join("models.yaml")).unwrap();
        let mut text = text.replacen("models:\n", &format!("models:\n{models}"), 1);
        for place in ["tiny/", "tiny-refiner/", "tiny-adapters/", "graphs/"] {
            text = text.replace(&format!(" {place}"), &format!(" {}/{place}", own.display()));
        }
        std::fs::write(folder.path().join("models.yaml"), text).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("models.yaml")
    }

    fn load(&self) -> Result<Catalogue, Error> {
        Catalogue::load(self.path())
    }
}

/// That a message has all of `parts`.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

const FAST: &str = "  fast:
    like: tiny
    origin: somewhere
    weights: {unet: [fast.safetensors]}
    scheduler: {timestep_spacing: trailing}
    defaults: {steps: 4, guidance: 0.0}
    distilled_steps: 4
";

#[test]
fn a_variant_has_what_it_does_not_say() {
    // One of another, before it in the file and in the alphabet.
    let more = "  a:
    like: fast
    licence: MIT
    scheduler: {prediction_type: sample}
    defaults: {steps: 1, width: 64, height: 72, scheduler: ddim}
    distilled_steps: 1
";
    let catalogue = Varied::new(&format!("{more}{FAST}")).load().unwrap();
    let [tiny, fast, a] = ["tiny", "fast", "a"].map(|name| &catalogue.models[name]);
    assert_eq!((&tiny.like, fast.like.as_deref()), (&None, Some("tiny")));
    assert_eq!(
        fast.weights["unet"],
        [FileRef::Path("fast.safetensors".into())]
    );
    assert_eq!(fast.weights["vae"], tiny.weights["vae"]);
    assert_eq!(fast.weights.len(), tiny.weights.len());
    assert_eq!((fast.origin.as_str(), &fast.licence), ("somewhere", &None));
    assert!(fast.adapters.keys().eq(tiny.adapters.keys()));
    assert!(fast.graph_files().eq(tiny.graph_files()));
    assert_eq!(
        (fast.defaults.steps, fast.defaults.width),
        (4, tiny.defaults.width)
    );
    assert_eq!(fast.defaults.guidance, 0.0);
    assert_eq!(fast.scheduler.prediction().unwrap(), Prediction::Epsilon);
    assert_eq!(
        (a.like.as_deref(), a.licence.as_deref()),
        (Some("fast"), Some("MIT"))
    );
    assert_eq!(
        (a.origin.as_str(), &a.weights),
        ("somewhere", &fast.weights)
    );
    assert_eq!((a.defaults.width, a.defaults.height), (64, 72));
    assert_eq!(a.scheduler.prediction().unwrap(), Prediction::Sample);
    assert_eq!(
        a.scheduler,
        fast.scheduler.clone().with("prediction_type", "sample")
    );
    assert_eq!(
        [tiny, fast, a].map(|m| m.distilled_steps),
        [None, Some(4), Some(1)]
    );
}

#[test]
fn what_is_wrong_with_a_variant_is_said() {
    for (from, to, parts) in [
        (
            "like: tiny",
            "like: dema",
            &["models.fast: like: no model `dema`", "known: fast, tiny, "][..],
        ),
        (
            "like: tiny",
            "like: fast",
            &["models.fast: like: ", "circle"],
        ),
        (
            "like: tiny",
            "like: 7.5",
            &["models.fast: like: no model `7.5`"],
        ),
        (
            "{unet: ",
            "{unit: ",
            &["models.fast: weights.unit: `tiny` has no", "unet, vae"],
        ),
        (
            "[fast.safetensors]",
            "[]",
            &["models.fast: weights.unet: lists no file"],
        ),
        (
            "timestep_spacing",
            "spacing",
            &["models.fast: scheduler.spacing: no scheduler"],
        ),
        (
            "steps: 4,",
            "steps: 0,",
            &["models.fast: defaults.steps: must not be 0"],
        ),
        (
            "guidance: 0.0",
            "guidance: .inf",
            &["models.fast: defaults.guidance: inf"],
        ),
        (
            "steps: 4\n",
            "steps: 0\n",
            &["models.fast: distilled_steps: must not be 0"],
        ),
        ("origin", "original", &["unknown field `original`", "line"]),
        ("{steps: 4", "{stepz: 4", &["unknown field `stepz`", "line"]),
        ("origin: somewhere", "role: base", &["unknown field `role`"]),
        (
            "    like: tiny\n    origin: somewhere\n",
            "    origin: x\n    like: tiny\n",
            &["models.fast: `like` must be the first key"],
        ),
    ] {
        assert!(FAST.contains(from), "{from}");
        let error = Varied::new(&FAST.replacen(from, to, 1)).load().unwrap_err();
        assert_says(&error.to_string(), &["models.yaml"]);
        assert_says(&error.to_string(), parts);
    }
}

#[test]
fn a_way_that_leads_to_no_whole_entry_is_said() {
    for (models, parts) in [
        (
            "  x:\n    like: y\n  y:\n    like: x\n",
            &["models.x: like: ", "circle"][..],
        ),
        ("  x: {}\n", &["is empty"]),
        ("  x: 7\n", &["begins with `like`"]),
    ] {
        assert_says(&Varied::new(models).load().unwrap_err().to_string(), parts);
    }
    let chain = |length: usize| {
        let models = (0..length).map(|at| format!("  x{at}:\n    like: x{}\n", at + 1));
        let whole = format!("  x{length}:\n    like: tiny\n");
        Varied::new(&format!("{}{whole}", models.collect::<String>())).load()
    };
    assert!(chain(7).is_ok());
    assert_says(&chain(5000).unwrap_err().to_string(), &["models.x0: like"]);
}

#[test]
fn lightning_has_the_published_steps_and_levels() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models.yaml");
    let catalogue = Catalogue::load(root).unwrap();
    // The levels of diffusers' EulerDiscreteScheduler.
    let levels: [(usize, &[f64], &[f64]); 4] = [
        (1, &[999.0], &[14.614_647, 0.0]),
        (2, &[999.0, 499.0], &[14.614_647, 1.612_887, 0.0]),
        (
            4,
            &[999.0, 749.0, 499.0, 249.0],
            &[14.614_647, 4.081_731, 1.612_887, 0.693_205, 0.0],
        ),
        (
            8,
            &[999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0],
            &[
                14.614_647, 7.297_354, 4.081_731, 2.492_532, 1.612_887, 1.068_952, 0.693_205,
                0.397_746, 0.0,
            ],
        ),
    ];
    let request = |model: String, loras: Option<String>| Request {
        prompt: "x".into(),
        model: Some(model),
        loras: loras.map(|lora| vec![lora.parse().unwrap()]),
        ..Request::default()
    };
    for (steps, timesteps, sigmas) in levels {
        let mut requests = vec![request(format!("sdxl-lightning-{steps}step"), None)];
        if steps > 1 {
            requests.push(request(
                "sdxl-base".into(),
                Some(format!("lightning-{steps}step")),
            ));
        }
        for request in requests {
            let resolved: Resolved = request.resolve(&catalogue, 0).unwrap();
            assert_eq!((resolved.steps, resolved.guidance), (steps, 0.0));
            assert_eq!(resolved.scheduler, SchedulerKind::Euler);
            assert_eq!(resolved.distilled.len(), 1);
            let config = &resolved.scheduler_config;
            let schedule = resolved
                .scheduler
                .plan(config, &resolved.sampling())
                .unwrap();
            assert_eq!(schedule.timesteps, timesteps);
            let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-6;
            assert!(
                schedule.sigmas.iter().zip(sigmas).all(near),
                "{:?}",
                schedule.sigmas
            );
            assert_eq!(schedule.sigmas.len(), sigmas.len());
            let sample = schedule.prediction == Prediction::Sample;
            assert_eq!(sample, steps == 1);
        }
    }
}

#[test]
fn lightning_has_the_published_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models.yaml");
    let catalogue = Catalogue::load(root).unwrap();
    for steps in [1, 2, 4, 8] {
        let model = &catalogue.models[&format!("sdxl-lightning-{steps}step")];
        let base = &catalogue.models["sdxl-base"];
        assert_eq!(model.weights["text_encoder"], base.weights["text_encoder"]);
        let [FileRef::Hub(unet)] = model.weights["unet"].as_slice() else {
            unreachable!()
        };
        let suffix = if steps == 1 { "_x0" } else { "" };
        let file = format!("sdxl_lightning_{steps}step_unet{suffix}.safetensors");
        assert_eq!(
            (unet.repo.as_str(), &unet.file),
            ("ByteDance/SDXL-Lightning", &file)
        );
    }
    assert!(!catalogue.loras.contains_key("lightning-1step"));
}

/// What is warned of while a request is prepared.
fn warnings(pipeline: &Pipeline, request: Request) -> Vec<String> {
    let request = Request {
        prompt: "a sailor".into(),
        model: Some(request.model.unwrap_or_else(|| "fast".into())),
        seed: Some(1.into()),
        ..request
    };
    let resolved = request.resolve(pipeline.catalogue(), 0).unwrap();
    let schedule = pipeline.schedule(&resolved).unwrap();
    let mut warnings = Vec::new();
    let prepared = pipeline.prepare(&resolved, schedule, &(0..0), &mut |event| {
        if let Event::Warning(warning) = event {
            warnings.push(warning.to_owned());
        }
        Control::Continue
    });
    prepared.unwrap();
    warnings
}

#[test]
fn what_a_distilled_model_was_not_made_for_is_warned_of() {
    let varied = Varied::new(FAST);
    let pipeline = Pipeline::open(Options {
        models: Some(varied.path()),
        ..Options::default()
    })
    .unwrap();
    let warned = |request: Request, parts: &[&[&str]]| {
        let found = warnings(&pipeline, request);
        assert_eq!(found.len(), parts.len(), "{found:?}");
        for (warning, parts) in found.iter().zip(parts) {
            assert_says(warning, parts);
        }
    };
    warned(Request::default(), &[]);
    let request = |fields: &str| -> Request { serde_json::from_str(fields).unwrap() };
    // Another rule, or the same timesteps said again, is no mistake.
    for same in [
        r#"{"scheduler": "ddim", "guidance": 1.0}"#,
        r#"{"scheduler": "dpmpp-2m", "spacing": "trailing"}"#,
        r#"{"timesteps-list": [999, 749, 499, 249]}"#,
    ] {
        warned(request(same), &[]);
    }
    warned(
        request(r#"{"steps": 6}"#),
        &[&["`fast` was distilled for 4 steps, not 6"]],
    );
    let leading = r#"{"spacing": "linspace"}"#;
    warned(
        request(leading),
        &[&[
            "`fast`",
            "timesteps 999, 749, 499, 249, not 999, 666, 333, 0",
        ]],
    );
    let karras = r#"{"sigmas": "karras"}"#;
    warned(
        request(karras),
        &[&["timesteps 999, 749, 499, 249, not 999, "]],
    );
    let guided = r#"{"guidance-list": [0.0, 3.0]}"#;
    warned(request(guided), &[&["without guidance", "guidance 2"]]);
    let all = r#"{"steps": 20, "guidance": 2.5, "spacing": "linspace"}"#;
    let long = &["not 999, 946.42", ", …;"][..];
    warned(
        request(all),
        &[&["4 steps, not 20"], long, &["guidance 2.5"]],
    );
    // Any other model takes any number of steps.
    warned(
        request(r#"{"model": "tiny", "steps": 30, "guidance": 5.0}"#),
        &[],
    );
}

#[test]
fn a_variants_spacing_is_that_of_its_configuration() {
    let catalogue = Varied::new(FAST).load().unwrap();
    let plan = |name: &str, spacing| {
        let options = SamplingOptions {
            spacing,
            ..SamplingOptions::steps(5)
        };
        SchedulerKind::Euler
            .plan(&catalogue.models[name].scheduler, &options)
            .unwrap()
            .timesteps
    };
    assert_eq!(plan("fast", None), plan("tiny", Some(Spacing::Trailing)));
    assert_ne!(plan("fast", None), plan("tiny", None));
}
