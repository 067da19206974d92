//! A whole model in one file paints what the same weights paint in the diffusers layout, bit for bit; what is none is
//! refused by its name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod loras;
mod original_layout;
mod refused;
#[path = "../support/safetensors_file.rs"]
mod safetensors_file;

use std::path::{Path, PathBuf};

use original_layout::Whole;
use tempfile::TempDir;
use tronie::checkpoint;
use tronie::manifest::{Catalogue, Model};
use tronie::memory::MemoryMode;
use tronie::request::ImagePrompt;
use tronie::schedule::Prediction;
use tronie::weights::{ExpansionCache, Weights};
use tronie::{Control, Error, Options, Output, Pipeline, Request};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// The tiny models' catalogue.
const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/models.yaml");

/// Files of a test, and a cache for what is expanded.
struct Shop {
    folder: TempDir,
}

impl Shop {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file with a model, and its name in a request.
    fn saved(&self, name: &str, whole: &Whole) -> String {
        let path = whole.save(&self.path(name));
        path.to_str().unwrap().to_owned()
    }

    fn tiny(&self) -> String {
        self.saved("tiny.safetensors", &Whole::of("tiny"))
    }

    /// What the executable prints that runs in the folder.
    fn tronie(&self, arguments: &[&str]) -> String {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tronie"));
        command.current_dir(self.folder.path()).args(arguments);
        if std::env::var_os("ORT_DYLIB_PATH").is_none() {
            command.env("VIRTUAL_ENV", Path::new(ROOT).join(".venv"));
        }
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{message}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A catalogue with the tiny models' entries and more of them.
    fn catalogue(&self, more: &str) -> PathBuf {
        let text =
            std::fs::read_to_string(Path::new(ROOT).join("tests/models/models.yaml")).unwrap();
        let text = absolute(&text);
        let path = self.path("models.yaml");
        std::fs::write(
            &path,
            text.replacen("models:\n", &format!("models:\n{more}"), 1),
        )
        .unwrap();
        path
    }
}

/// Entries whose files are the repository's wherever they stand.
fn absolute(entries: &str) -> String {
    let places = ["tiny/", "tiny-refiner/", "tiny-adapters/", "graphs/"];
    places.iter().fold(entries.to_owned(), |entries, place| {
        entries.replace(
            &format!(" {place}"),
            &format!(" {ROOT}/tests/models/{place}"),
        )
    })
}

fn pipeline(models: &Path, expansions: ExpansionCache) -> Pipeline {
    Pipeline::open(Options {
        models: Some(models.to_owned()),
        expansions: Some(expansions),
        ..Options::default()
    })
    .unwrap()
}

fn plain() -> Pipeline {
    let models = Path::new(ROOT).join("tests/models/models.yaml");
    pipeline(&models, ExpansionCache::off())
}

fn request(model: &str) -> Request {
    Request {
        prompt: "a sailor".into(),
        model: Some(model.into()),
        steps: Some(3),
        seed: Some(5.into()),
        memory: Some(MemoryMode::Balanced),
        ..Request::default()
    }
}

fn paint(pipeline: &Pipeline, request: &Request) -> Result<Output, Error> {
    pipeline.generate(request, &mut |_| Control::Continue)
}

fn same(a: &Output, b: &Output, label: &str) {
    assert!(a.handoff.latents == b.handoff.latents, "{label}");
    assert!(a.pictures == b.pictures, "{label}");
}

#[test]
fn a_file_paints_what_its_weights_paint_in_the_diffusers_layout() {
    let shop = Shop::new();
    let with = |model: &str, refiner: &str, mode| Request {
        refiner: Some(refiner.into()),
        refine_at: Some(0.6),
        memory: Some(mode),
        ..request(model)
    };
    let refiner = shop.saved("refiner.safetensors", &Whole::of("tiny-refiner"));
    let (narrow, mut mixed) = (Whole::of("tiny"), Whole::of("tiny"));
    let mut wide = narrow.clone();
    wide.widen("");
    mixed.widen("conditioner.embedders.1");
    mixed.widen("first_stage_model.decoder");
    let models = Path::new(ROOT).join("tests/models/models.yaml");
    for mode in MemoryMode::ALL {
        let wanted = paint(&plain(), &with("tiny", "tiny-refiner", mode)).unwrap();
        for (name, whole) in [("f16", &narrow), ("f32", &wide), ("mixed", &mixed)] {
            let file = shop.saved(&format!("{name}.safetensors"), whole);
            let given = with(&file, &refiner, mode);
            let found = paint(&plain(), &given).unwrap();
            same(&found, &wanted, &format!("{name}, {mode}"));
            let cache = ExpansionCache::at(shop.path("cache")).with_smallest(1);
            let found = paint(&pipeline(&models, cache.clone()), &given).unwrap();
            same(&found, &wanted, &format!("{name}, {mode}, expanded"));
            // One for the file, one for the refiner's.
            assert!(cache.entries().unwrap().len() <= 3);
        }
    }
}

#[test]
fn a_component_has_the_tensors_of_its_file_in_the_diffusers_layout() {
    let shop = Shop::new();
    let whole = Weights::open(&[PathBuf::from(shop.tiny())]).unwrap();
    for (key, file) in [
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
        ("text_encoder_2", "text_encoder_2/model.safetensors"),
    ] {
        let own = Weights::open(&[Path::new(ROOT).join("tests/models/tiny").join(file)]).unwrap();
        let seen = checkpoint::component(&whole, key, own.names()).unwrap();
        assert!(seen.names().eq(own.names()), "{key}");
        for name in own.names() {
            let shape = own.shape(name).unwrap();
            let values = own.tensor_f32(name, shape).unwrap();
            let found = seen.tensor_f32(name, shape).unwrap();
            assert!(found.as_slice() == values.as_slice(), "{key}: {name}");
        }
    }
}

#[test]
fn the_record_makes_the_picture_again_and_adapters_stay() {
    let shop = Shop::new();
    let (file, pipeline) = (shop.tiny(), plain());
    let first = paint(&pipeline, &request(&file)).unwrap();
    assert_eq!(first.request.model.as_deref(), Some(file.as_str()));
    let json = serde_json::to_string(&first.request).unwrap();
    let again = Request::from_json(&json, Path::new("record")).unwrap();
    same(&paint(&plain(), &again).unwrap(), &first, "record");
    let picture = shop.path("seen.png");
    first.pictures[0].save(&picture).unwrap();
    let prompted = |model: &str| Request {
        image_prompts: Some(vec![ImagePrompt {
            adapter: "ip-adapter-plus".into(),
            pictures: vec![picture.clone()],
            ..ImagePrompt::default()
        }]),
        ..request(model)
    };
    let wanted = paint(&pipeline, &prompted("tiny")).unwrap();
    assert!(wanted.pictures != first.pictures);
    same(
        &paint(&pipeline, &prompted(&file)).unwrap(),
        &wanted,
        "adapter",
    );
}

#[test]
fn an_entry_of_the_catalogue_may_name_a_file() {
    let shop = Shop::new();
    let mut whole = Whole::of("tiny");
    let file = shop.saved("whole.safetensors", &whole);
    whole.retain(|name| !name.starts_with("first_stage_model."));
    let blind = shop.saved("blind.safetensors", &whole);
    let vae = format!("{ROOT}/tests/models/tiny/vae/diffusion_pytorch_model.safetensors");
    let models = shop.catalogue(&format!(
        "  mine:\n    like: tiny\n    checkpoint: {file}\n  blind:\n    like: tiny\n    checkpoint: {blind}\n  \
         completed:\n    like: tiny\n    checkpoint: {blind}\n    weights:\n      vae:\n        - {vae}\n"
    ));
    let pipeline = pipeline(&models, ExpansionCache::off());
    let wanted = paint(&pipeline, &request("tiny")).unwrap();
    for name in ["mine", "completed"] {
        same(&paint(&pipeline, &request(name)).unwrap(), &wanted, name);
    }
    let error = paint(&pipeline, &request("blind")).unwrap_err().to_string();
    assert!(error.contains("has no VAE"), "{error}");
    // A variant is not taken for the model of a file.
    same(&paint(&pipeline, &request(&file)).unwrap(), &wanted, "file");
}

/// The model that a file becomes.
fn opened(models: &Path, name: &str) -> Result<Model, Error> {
    let catalogue = Catalogue::load(models).unwrap();
    checkpoint::open(&catalogue, &request(name))?;
    catalogue.model("model", name).cloned()
}

#[test]
fn marks_of_training_configure_the_scheduler() {
    let shop = Shop::new();
    let models = Path::new(ROOT).join("tests/models/models.yaml");
    let (mut marked, mut told, mut both) =
        (Whole::of("tiny"), Whole::of("tiny"), Whole::of("tiny"));
    marked.mark("v_pred");
    told.metadata = Some(("modelspec.prediction_type", "v"));
    both.mark("v_pred");
    both.mark("ztsnr");
    for (name, whole, prediction, zero_snr) in [
        ("plain", &Whole::of("tiny"), Prediction::Epsilon, false),
        ("marked", &marked, Prediction::VPrediction, false),
        ("told", &told, Prediction::VPrediction, false),
        ("both", &both, Prediction::VPrediction, true),
    ] {
        let file = shop.saved(&format!("{name}.safetensors"), whole);
        let model = opened(&models, &file).unwrap();
        assert_eq!(model.scheduler.prediction().unwrap(), prediction, "{name}");
        let mut settings = model.scheduler.settings();
        let is_set = settings
            .any(|(key, value)| key == "rescale_betas_zero_snr" && value.to_string() == "true");
        assert_eq!(is_set, zero_snr, "{name}");
    }
    let file = shop.path("both.safetensors");
    paint(&plain(), &request(file.to_str().unwrap())).unwrap();
    let mine = format!(
        "  mine:\n    like: tiny\n    checkpoint: {}\n",
        file.display()
    );
    let pipeline = pipeline(&shop.catalogue(&mine), ExpansionCache::off());
    let mut warnings = Vec::new();
    pipeline
        .generate(&request("mine"), &mut |event| {
            if let tronie::Event::Warning(text) = event {
                warnings.push(text.to_owned());
            }
            Control::Continue
        })
        .unwrap();
    let wanted = "{prediction_type: v_prediction, rescale_betas_zero_snr: true}";
    assert!(warnings.iter().any(|w| w.contains(wanted)), "{warnings:?}");
}

#[test]
fn of_several_entries_that_fit_one_is_taken_only_if_they_are_alike() {
    let shop = Shop::new();
    let file = shop.tiny();
    let text = std::fs::read_to_string(Path::new(ROOT).join("tests/models/models.yaml")).unwrap();
    let (_, tiny) = text.split_once("  tiny:\n").unwrap();
    let (tiny, _) = tiny.split_once("  tiny-refiner:\n").unwrap();
    let models = shop.catalogue(&format!("  alike:\n{}", absolute(tiny)));
    opened(&models, &file).unwrap();
    let other = tiny.replace("prediction_type: epsilon", "prediction_type: v_prediction");
    assert_ne!(other, tiny);
    let models = shop.catalogue(&format!("  other:\n{}", absolute(&other)));
    let model = opened(&models, &file).unwrap();
    assert_eq!(model.like.as_deref(), Some("tiny"));
    let other = tiny.replace("timestep_spacing: leading", "timestep_spacing: trailing");
    assert_ne!(other, tiny);
    let models = shop.catalogue(&format!("  other:\n{}", absolute(&other)));
    let error = opened(&models, &file).unwrap_err().to_string();
    for part in [
        "fits several models",
        "`tiny`",
        "`other`",
        "`like: ",
        "`checkpoint: FILE`",
    ] {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

#[test]
fn the_command_line_takes_files_and_their_records() {
    let shop = Shop::new();
    shop.tiny();
    let tronie = |arguments: &[&str]| shop.tronie(arguments);
    let common = ["--steps", "2", "--seed", "3", "--memory", "balanced"];
    let file = [
        "generate",
        "a sailor",
        "--models",
        MODELS,
        "--model",
        "tiny.safetensors",
    ];
    tronie(&[&file[..], &common].concat());
    let picture = shop.path("out/tiny-3.png");
    let painted = std::fs::read(&picture).unwrap();
    std::fs::remove_file(&picture).unwrap();
    let kept = shop.path("kept.png");
    std::fs::write(&kept, &painted).unwrap();
    tronie(&["generate", "--request", "kept.png"]);
    assert!(std::fs::read(&picture).unwrap() == painted);
    let named = [
        "generate", "a sailor", "--models", MODELS, "--model", "tiny",
    ];
    tronie(&[&named[..], &common, &["--output", "named.png"]].concat());
    let pixels = |path: &Path| image::open(path).unwrap().into_rgb8();
    assert!(pixels(&shop.path("named.png")) == pixels(&kept));
    tronie(&[
        "schedulers",
        "--models",
        MODELS,
        "--model",
        "tiny.safetensors",
    ]);
    let measured = [
        "bench",
        "--models",
        MODELS,
        "--model",
        "tiny.safetensors",
        "--steps",
        "2",
    ];
    let few = [
        "--memory",
        "balanced",
        "--runs",
        "1",
        "--times-only",
        "--json",
    ];
    let output = tronie(&[&measured[..], &few].concat());
    assert!(output.contains(r#""model": "tiny.safetensors""#));
}
