//! Which networks a pipeline loads for its second request.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use tronie::progress::Stage;
use tronie::{Control, Event, MemoryMode, Options, Pipeline, Request};

/// The networks that one request loads, in order.
fn loaded(pipeline: &Pipeline, memory: MemoryMode, refiner: Option<&str>) -> Vec<String> {
    let request = Request {
        prompt: "a sailor".into(),
        model: Some("tiny".into()),
        refiner: refiner.map(str::to_owned),
        steps: Some(2),
        refine_at: refiner.map(|_| 0.5),
        seed: Some(1.into()),
        memory: Some(memory),
        ..Request::default()
    };
    let mut loaded = Vec::new();
    let output = pipeline.generate(&request, &mut |event| {
        if let Event::Stage {
            stage: Stage::Load,
            what,
        } = event
        {
            loaded.push(what.to_owned());
        }
        Control::Continue
    });
    assert_eq!(output.unwrap().pictures.len(), 1);
    loaded
}

#[test]
fn fast_keeps_the_networks_of_a_request_and_the_other_modes_none() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/models.yaml");
    let pipeline = Pipeline::open(Options {
        models: Some(models),
        ..Options::default()
    })
    .unwrap();
    let whole = [
        "text_encoder of tiny",
        "text_encoder_2 of tiny",
        "kv of tiny",
        "unet of tiny",
    ];
    let whole = [&whole[..], &["vae_decoder of tiny"]].concat();
    assert_eq!(loaded(&pipeline, MemoryMode::Fast, None), whole);
    assert!(loaded(&pipeline, MemoryMode::Fast, None).is_empty());
    let refiner = [
        "text_encoder_2 of tiny-refiner",
        "kv of tiny-refiner",
        "unet of tiny-refiner",
        "vae_decoder of tiny-refiner",
    ];
    assert_eq!(
        loaded(&pipeline, MemoryMode::Fast, Some("tiny-refiner")),
        refiner
    );
    // A request without the refiner drops what it has no use for.
    assert!(loaded(&pipeline, MemoryMode::Fast, None).is_empty());
    assert_eq!(
        loaded(&pipeline, MemoryMode::Fast, Some("tiny-refiner")),
        refiner
    );
    for mode in [MemoryMode::Low, MemoryMode::Balanced] {
        assert_eq!(loaded(&pipeline, mode, None), whole);
        assert_eq!(loaded(&pipeline, mode, None), whole);
    }
    assert_eq!(loaded(&pipeline, MemoryMode::Fast, None), whole);
}

#[test]
fn other_image_prompts_load_nothing_anew() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let picture =
        image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, 9]));
    picture.save(file("a.png")).unwrap();
    image::RgbImage::from_pixel(8, 8, image::Rgb([255; 3]))
        .save(file("m.png"))
        .unwrap();
    let pipeline = Pipeline::open(Options {
        models: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/models.yaml")),
        ..Options::default()
    })
    .unwrap();
    let loaded = |prompts: &[&str]| {
        let (a, m) = (file("a.png"), file("m.png"));
        let prompts = prompts
            .iter()
            .map(|p| p.replace("%a", &a).replace("%m", &m).parse().unwrap());
        let request = Request {
            prompt: "a sailor".into(),
            model: Some("tiny".into()),
            steps: Some(2),
            seed: Some(1.into()),
            memory: Some(MemoryMode::Fast),
            image_prompts: Some(prompts.collect()),
            ..Request::default()
        };
        let mut loads = 0;
        let output = pipeline.generate(&request, &mut |event| {
            let stage = matches!(
                &event,
                Event::Stage {
                    stage: Stage::Load,
                    ..
                }
            );
            loads += usize::from(stage);
            Control::Continue
        });
        output.unwrap();
        loads
    };
    let both = ["ip-adapter=%a@0.5", "ip-adapter-plus=%a"];
    assert!(loaded(&both) > 0);
    for others in [
        ["ip-adapter=%a@-0.2", "ip-adapter-plus=%a,%a@steps=0,0.5"],
        ["ip-adapter=%a@mask=%m", r#"ip-adapter-plus=%a@{"mid": 1}"#],
    ] {
        assert_eq!(loaded(&others), 0);
    }
    let three = [&both[..], &["ip-adapter=%a@style"]].concat();
    assert_eq!(loaded(&three), 0);
}

#[test]
fn other_loras_load_the_networks_that_they_change() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/loras");
    let folder = tempfile::tempdir().unwrap();
    let changing = folder.path().join("changing.safetensors");
    std::fs::copy(golden.join("tiny-peft.safetensors"), &changing).unwrap();
    let kohya = golden.join("tiny-kohya.safetensors").display().to_string();
    let changing_name = changing.display().to_string();
    let pipeline = Pipeline::open(Options {
        models: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/models.yaml")),
        ..Options::default()
    })
    .unwrap();
    let painted = |loras: &[&str]| {
        let loras = loras.iter().map(|lora| lora.parse().unwrap());
        let request = Request {
            prompt: "a sailor".into(),
            model: Some("tiny".into()),
            steps: Some(2),
            seed: Some(1.into()),
            memory: Some(MemoryMode::Fast),
            loras: Some(loras.collect()),
            ..Request::default()
        };
        let mut loaded = Vec::new();
        let output = pipeline.generate(&request, &mut |event| {
            if let Event::Stage {
                stage: Stage::Load,
                what,
            } = event
            {
                loaded.push(what.split(' ').next().unwrap().to_owned());
            }
            Control::Continue
        });
        (output.unwrap().pictures.remove(0), loaded)
    };
    let (plain, _) = painted(&[]);
    // This one changes the UNet only, and with it the keys and values of the text.
    let (with, loaded) = painted(&[&changing_name]);
    assert_eq!(loaded, ["kv", "unet"]);
    assert_ne!(plain, with);
    assert_eq!(painted(&[&changing_name]), (with, Vec::new()));
    let (weaker, loaded) = painted(&[&format!("{changing_name}@0.5")]);
    assert_eq!(loaded, ["kv", "unet"]);
    let all = ["text_encoder", "text_encoder_2", "kv", "unet"];
    assert_eq!(painted(&[&kohya]).1, all);
    let text_only = format!("{kohya}@1:te=0.5");
    assert_eq!(painted(&[&text_only]).1, all[..2]);
    assert_eq!(painted(&[&format!("{kohya}@0.5:te=0.5")]).1, all[2..]);
    let (again, loaded) = painted(&[]);
    assert_eq!((again, loaded), (plain, all.map(str::to_owned).to_vec()));
    // The same name and another file.
    std::fs::remove_file(&changing).unwrap();
    std::fs::copy(&kohya, &changing).unwrap();
    let (other, loaded) = painted(&[&format!("{changing_name}@0.5")]);
    assert_eq!(loaded, all);
    assert_ne!(other, weaker);
}
