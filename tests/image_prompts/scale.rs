//! Scales of image prompts by block, against diffusers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use serde::Deserialize;
use tronie::manifest::Attention;
use tronie::request::{BlockScales, ImageScale, Scales, SideScales};

#[derive(Deserialize)]
struct Golden {
    models: std::collections::BTreeMap<String, Expansions>,
}

#[derive(Deserialize)]
struct Expansions {
    attentions: Vec<Module>,
    cases: Vec<Case>,
    refused: Vec<ImageScale>,
}

#[derive(Deserialize)]
struct Module {
    name: String,
    width: usize,
    layers: usize,
}

#[derive(Deserialize)]
struct Case {
    scale: ImageScale,
    expanded: Vec<f64>,
}

fn golden() -> Golden {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/image-scales.json"
    );
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn attentions(of: &Expansions) -> Vec<Attention> {
    let attentions = of.attentions.iter().map(|module| Attention {
        name: module.name.clone(),
        width: module.width,
        layers: module.layers,
        factor: 2,
    });
    attentions.collect()
}

fn scale(text: &str) -> ImageScale {
    text.parse().unwrap()
}

/// That a message has all of `parts`.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn scales_of_blocks_are_those_of_diffusers() {
    for (model, expansions) in golden().models {
        let attentions = attentions(&expansions);
        assert!(expansions.cases.len() > 10);
        for Case { scale, expanded } in &expansions.cases {
            let found = scale.per_layer(0, &attentions).unwrap();
            assert_eq!(&found, expanded, "{model}: {scale}");
            let written = self::scale(&scale.to_string());
            assert_eq!(written.per_layer(0, &attentions).unwrap(), found, "{scale}");
        }
    }
}

#[test]
fn lists_of_another_length_are_refused_as_diffusers_does() {
    for (model, expansions) in golden().models {
        let attentions = attentions(&expansions);
        assert!(expansions.refused.len() >= 4, "{model}");
        for scale in &expansions.refused {
            let error = scale.per_layer(0, &attentions).unwrap_err().to_string();
            assert_says(&error, &["image-prompt: scale of ", "numbers; give one"]);
        }
    }
}

#[test]
fn the_order_of_the_list_decides_the_order_of_the_scales() {
    let mut attentions = attentions(&golden().models["sdxl-base"]);
    let scale = scale(r#"{"up": {"block_0": [1, 2, 3]}, "mid": 4}"#);
    let forward = scale.per_layer(0, &attentions).unwrap();
    attentions.reverse();
    let mut backward = scale.per_layer(0, &attentions).unwrap();
    backward.reverse();
    assert_eq!(forward, backward);
}

#[test]
fn blocks_that_a_unet_does_not_have_are_refused_with_those_it_has() {
    let models = golden().models;
    let base = attentions(&models["sdxl-base"]);
    let known = "down.block_1, down.block_2, mid, up.block_0, up.block_1";
    for (text, name) in [
        (r#"{"up": {"block_2": 1}}"#, "`up.block_2`"),
        (r#"{"down": {"block_01": 1}}"#, "`down.block_01`"),
        (r#"{"down": {"1": 1}}"#, "`down.1`"),
    ] {
        let error = scale(text).per_layer(0, &base).unwrap_err().to_string();
        assert_says(&error, &[name, known]);
    }
    let only_down = &base[..4];
    for (text, name) in [(r#"{"mid": 0}"#, "`mid`"), (r#"{"up": 1}"#, "`up`")] {
        let error = scale(text).per_layer(0, only_down).unwrap_err().to_string();
        assert_says(&error, &[name, "it has: down.block_1, down.block_2"]);
    }
    let refiner = attentions(&models["sdxl-refiner"]);
    for text in ["style", "style+layout"] {
        let error = scale(text).per_layer(0, &refiner).unwrap_err().to_string();
        assert_says(
            &error,
            &[text, "up_blocks.0.attentions.1", "up_blocks.1.attentions.0"],
        );
    }
}

#[test]
fn scales_that_f32_does_not_hold_are_refused() {
    let base = attentions(&golden().models["sdxl-base"]);
    let each = Scales::Each(vec![0.0, 1e39, 0.0]);
    let up = SideScales::Blocks([("block_0".to_owned(), each)].into());
    let blocks = BlockScales {
        up: Some(up),
        ..BlockScales::default()
    };
    for scale in [
        ImageScale::Number(f64::NAN),
        ImageScale::Number(f64::NEG_INFINITY),
        ImageScale::Blocks(blocks),
    ] {
        let error = scale.per_layer(0, &base).unwrap_err().to_string();
        assert_says(&error, &["image-prompt", "not a finite number in f32"]);
    }
}

fn scales() -> impl Strategy<Value = Scales> {
    let number = proptest::num::f64::ANY;
    prop_oneof![
        number.prop_map(Scales::One),
        prop::collection::vec(number, 0..4).prop_map(Scales::Each),
    ]
}

fn side() -> impl Strategy<Value = Option<SideScales>> {
    let blocks = prop::collection::btree_map("block_[0-9]", scales(), 0..3);
    prop::option::of(prop_oneof![
        scales().prop_map(SideScales::All),
        blocks.prop_map(SideScales::Blocks),
    ])
}

proptest! {
    #[test]
    fn scales_are_as_many_as_attentions_and_finite_or_refused(
        down in side(),
        mid in prop::option::of(scales()),
        up in side(),
        count in 0_usize..12,
    ) {
        let attentions = &attentions(&golden().models["tiny"])[..count.min(11)];
        let scale = ImageScale::Blocks(BlockScales { down, mid, up });
        if let Ok(scales) = scale.per_layer(0, attentions) {
            prop_assert_eq!(scales.len(), attentions.len());
            prop_assert!(scales.iter().all(|scale| (*scale as f32).is_finite()));
        }
    }
}
