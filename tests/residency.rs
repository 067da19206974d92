//! Which networks a pipeline loads for its second request.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use tronie::progress::Stage;
use tronie::{Control, Event, MemoryMode, Options, Pipeline, Request};

/// The networks that one request loads, in order.
fn loaded(pipeline: &Pipeline, memory: MemoryMode, refiner: Option<&str>) -> Vec<String> {
    let request = Request {
        prompt: "a sailor".into(),
        model: Some("demo".into()),
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
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models.yaml");
    let pipeline = Pipeline::open(Options {
        models: Some(models),
        ..Options::default()
    })
    .unwrap();
    let whole = [
        "text_encoder of demo",
        "text_encoder_2 of demo",
        "kv of demo",
        "unet of demo",
    ];
    let whole = [&whole[..], &["vae_decoder of demo"]].concat();
    assert_eq!(loaded(&pipeline, MemoryMode::Fast, None), whole);
    assert!(loaded(&pipeline, MemoryMode::Fast, None).is_empty());
    let refiner = [
        "text_encoder_2 of demo-refiner",
        "kv of demo-refiner",
        "unet of demo-refiner",
        "vae_decoder of demo-refiner",
    ];
    assert_eq!(
        loaded(&pipeline, MemoryMode::Fast, Some("demo-refiner")),
        refiner
    );
    // A request without the refiner drops what it has no use for.
    assert!(loaded(&pipeline, MemoryMode::Fast, None).is_empty());
    assert_eq!(
        loaded(&pipeline, MemoryMode::Fast, Some("demo-refiner")),
        refiner
    );
    for mode in [MemoryMode::Low, MemoryMode::Balanced] {
        assert_eq!(loaded(&pipeline, mode, None), whole);
        assert_eq!(loaded(&pipeline, mode, None), whole);
    }
    assert_eq!(loaded(&pipeline, MemoryMode::Fast, None), whole);
}
