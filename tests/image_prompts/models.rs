//! Image prompts and the catalogue: what an entry says of adapters, and what a request may ask of them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use tronie::error::Error;
use tronie::manifest::{Catalogue, Side};
use tronie::request::{ImagePrompt, ImageScale, Request};

fn parsed(text: &str) -> ImagePrompt {
    text.parse().unwrap()
}

/// That a message has all of `parts`.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// The tiny's catalogue with adapters of every form.
struct Adapted {
    folder: tempfile::TempDir,
}

const ATTENTIONS: &str = "
      attentions:
        - {name: down_blocks.1.attentions.0, width: 16, layers: 2, factor: 2}
        - {name: down_blocks.1.attentions.1, width: 16, layers: 2, factor: 2}
        - {name: down_blocks.2.attentions.0, width: 24, layers: 1, factor: 4}
        - {name: down_blocks.2.attentions.1, width: 24, layers: 1, factor: 4}
        - {name: up_blocks.0.attentions.0, width: 24, layers: 1, factor: 4}
        - {name: up_blocks.0.attentions.1, width: 24, layers: 1, factor: 4}
        - {name: up_blocks.0.attentions.2, width: 24, layers: 1, factor: 4}
        - {name: up_blocks.1.attentions.0, width: 16, layers: 2, factor: 2}
        - {name: up_blocks.1.attentions.1, width: 16, layers: 2, factor: 2}
        - {name: up_blocks.1.attentions.2, width: 16, layers: 2, factor: 2}
        - {name: mid_block.attentions.0, width: 24, layers: 1, factor: 4}";

const ADAPTERS: &str = "
    image_encoders:
      image_encoder: {size: 224, mean: [0.48, 0.46, 0.41], std: [0.27, 0.26, 0.28]}
    adapters:
      face:
        {kind: ip-adapter, form: faceid, origin: models/face, identity: 512, tokens: 4}
      both:
        {kind: ip-adapter, form: faceid-plusv2, origin: models/both, image_encoder: image_encoder, identity: 512, tokens: 4}
      plus:
        {kind: ip-adapter, form: plus, origin: models/plus, image_encoder: image_encoder, tokens: 16}";

impl Adapted {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut text = std::fs::read_to_string(root.join("tests/models/models.yaml")).unwrap();
        // The tiny's own, which these replace.
        let mut cut = |from: &str, to: &str| {
            let start = text.find(from).unwrap();
            let end = start + text[start..].find(to).unwrap();
            text.replace_range(start..end, "");
        };
        cut("      attentions:\n", "    vae:\n");
        cut("    image_encoders:\n", "    force_zeros");
        cut("      unet_image:\n", "      vae_decoder:\n");
        cut(
            "      image_encoder:\n        weights:",
            "      ip-adapter.projection:\n",
        );
        let mut insert = |after: &str, what: &str| {
            let at = text.find(after).unwrap() + after.len();
            text.insert_str(at, what);
        };
        insert("        24: 6", ATTENTIONS);
        insert("licence: MIT OR Apache-2.0", ADAPTERS);
        let graphs = [
            "unet_image",
            "image_encoder",
            "plus.projection",
            "plus.kv",
            "face.projection",
            "face.kv",
            "both.projection",
            "both.kv",
        ];
        let graphs =
            graphs.map(|name| format!("\n      {name}: {{weights: unet, fused: x.onnx.gz}}"));
        insert("    graphs:", &graphs.concat());
        std::fs::write(folder.path().join("models.yaml"), text).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("models.yaml")
    }

    fn edit(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path()).unwrap();
        assert!(text.contains(from), "{from:?} is not in the catalogue");
        std::fs::write(self.path(), text.replacen(from, to, 1)).unwrap();
    }

    fn catalogue(&self) -> Catalogue {
        Catalogue::load(self.path()).unwrap()
    }
}

fn request(prompts: &[&str]) -> Request {
    Request {
        model: Some("tiny".into()),
        image_prompts: Some(prompts.iter().map(|text| parsed(text)).collect()),
        ..Request::default()
    }
}

#[test]
fn a_catalogue_knows_adapters_encoders_and_where_a_unet_listens() {
    let catalogue = Adapted::new().catalogue();
    let model = catalogue.model("model", "tiny").unwrap();
    assert_eq!(model.adapter("plus").unwrap().tokens, 16);
    assert_eq!(model.image_encoder("image_encoder").unwrap().size, 224);
    assert!(model.image_encoder("other").is_err());
    assert_eq!(model.unet.attentions[5].place(), Some((Side::Up, 0, 1)));
    let grids = model.unet.grids(17, 32);
    assert_eq!(
        grids.into_iter().collect::<Vec<_>>(),
        [(2, (9, 16)), (4, (5, 8))]
    );
}

/// Makes the catalogue wrong in one place, and looks for `parts` in the refusal.
fn refused(from: &str, to: &str, parts: &[&str]) {
    let adapted = Adapted::new();
    adapted.edit(from, to);
    let error = Catalogue::load(adapted.path()).unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{to}: {error}");
    assert_says(&error.to_string(), &[&["models.yaml: "], parts].concat());
}

#[test]
fn what_is_wrong_with_adapters_in_a_catalogue_is_named() {
    for (from, to, parts) in [
        (
            "unet_image:",
            "unet_picture:",
            &["graph `unet_image` is missing", "export"][..],
        ),
        (
            "plus.projection:",
            "plus.x:",
            &["adapters.plus", "`plus.projection` is missing"],
        ),
        (
            "face.kv:",
            "face.x:",
            &["adapters.face", "`face.kv` is missing"],
        ),
        (
            "image_encoder: image_encoder, tokens: 16",
            "tokens: 16",
            &["adapters.plus: image_encoder is missing"],
        ),
        (
            "image_encoder: image_encoder, tokens: 16",
            "image_encoder: other, tokens: 16",
            &["adapters.plus: no `other` under image_encoders"],
        ),
        (
            "tokens: 16",
            "tokens: 0",
            &["adapters.plus: tokens must not be 0"],
        ),
        (
            "form: plus",
            "form: plush",
            &["plush", "`faceid-plusv2`", "line"],
        ),
        ("kind: ip-adapter", "kind: lora", &["lora", "`ip-adapter`"]),
        (
            "tokens: 16",
            "tokens: 16, token: 1",
            &["unknown field `token`"],
        ),
        (
            "      face:\n",
            "      f=e:\n",
            &["adapters.f=e: a name must not"],
        ),
    ] {
        refused(from, to, parts);
    }
}

#[test]
fn what_is_wrong_with_identities_in_a_catalogue_is_named() {
    for (from, to, parts) in [
        (
            "identity: 512, tokens: 4}\n      both",
            "tokens: 4}\n      both",
            &["adapters.face: identity is missing", "export"][..],
        ),
        (
            "identity: 512",
            "identity: 0",
            &["adapters.face: identity must not be 0"],
        ),
        (
            "tokens: 16",
            "identity: 512, tokens: 16",
            &["adapters.plus: the form plus has no identity"],
        ),
        (
            "origin: models/face",
            "origin: models/face, image_encoder: image_encoder",
            &["adapters.face: the form faceid has no image_encoder"],
        ),
    ] {
        refused(from, to, parts);
    }
}

#[test]
fn what_is_wrong_with_encoders_and_attentions_in_a_catalogue_is_named() {
    for (from, to, parts) in [
        (
            "      image_encoder: {weights",
            "      other: {weights",
            &["image_encoders.image_encoder: no graph"][..],
        ),
        (
            "size: 224",
            "size: 0",
            &["image_encoders.image_encoder.size", "4096"],
        ),
        (
            "mean: [0.48",
            "mean: [.nan",
            &["image_encoder.mean: must be finite"],
        ),
        ("std: [0.27", "std: [0.0", &["image_encoder.std", "above 0"]),
        ("std: [0.27", "std: [0.27, 0.27", &["line"]),
        (
            "width: 16, layers: 2",
            "width: 16, layers: 3",
            &["unet.attentions", "{16: 11, 24: 6}", "{16: 10, 24: 6}"],
        ),
        (
            "width: 16, layers: 2",
            "width: 16, layers: 0",
            &["unet.attentions[0]", "must not be 0"],
        ),
        (
            "factor: 2",
            "factor: 0",
            &["unet.attentions[0]", "must not be 0"],
        ),
        (
            "up_blocks.0.attentions.1",
            "up_blocks.0.attentions.2",
            &["unet.attentions[6]", "listed twice"],
        ),
        (
            "mid_block.attentions.0",
            "middle.attentions.0",
            &["unet.attentions[10]: `middle.attentions.0`"],
        ),
    ] {
        refused(from, to, parts);
    }
    let parts = ["adapters.both: unet.attentions is missing", "export"];
    refused(ATTENTIONS, "", &parts);
}

/// Asserts that a prompt beside a good one is refused with these words.
fn refused_prompt(catalogue: &Catalogue, prompt: &str, parts: &[&str]) {
    let error = request(&["plus=a", prompt])
        .resolve(catalogue, 0)
        .unwrap_err();
    assert_eq!(error.code(), 2);
    assert_says(&error.to_string(), &[&["image-prompt: "], parts].concat());
}

#[test]
fn what_a_model_cannot_make_of_an_identity_is_named() {
    let catalogue = Adapted::new().catalogue();
    for (prompt, parts) in [
        (
            "face=a@face=b",
            &["`face`: is of the form faceid, which has no face"][..],
        ),
        ("plus=a@shortcut=1", &["form plus, which has no shortcut"]),
        (
            "plus=a@negative-face=b",
            &["form plus, which has no negative-face"],
        ),
        (
            "both=a,b@face=c",
            &["1 pictures of faces for 2 identities", "@face=FILE"],
        ),
        ("both=a", &["0 pictures of faces for 1 identities"]),
        (
            "both=a@face=b@negative=c",
            &["needs negative, an identity, and negative-face"],
        ),
        ("both=a@face=b@shortcut=1e39", &["shortcut is not a finite"]),
    ] {
        refused_prompt(&catalogue, prompt, parts);
    }
}

#[test]
fn what_a_model_cannot_make_of_an_image_prompt_is_named() {
    let catalogue = Adapted::new().catalogue();
    for (prompt, parts) in [
        (
            "pluss=a",
            &["no adapter `pluss`; the model has: both, face, plus"][..],
        ),
        ("plus=a,b@mask=m", &["`plus`: has 1 masks for 2 pictures"]),
        ("plus=a@mask=m,n", &["`plus`: has 2 masks for 1 pictures"]),
        (
            "plus=a@steps=0.5,0.5",
            &["steps 0.5,0.5", "0 <= START < END <= 1"],
        ),
        ("plus=a@steps=0.6,0.5", &["steps 0.6,0.5"]),
        ("plus=a@steps=-0.1,0.5", &["steps -0.1,0.5"]),
        ("plus=a@steps=0.5,1.5", &["steps 0.5,1.5"]),
        ("plus=a,b@1,2", &["has 2 scales for 0 masks"]),
        ("plus=a,b@1,2,3@mask=m,n", &["has 3 scales for 2 masks"]),
        (
            "plus=a,b@1,1e39@mask=m,n",
            &["is not a finite number in f32"],
        ),
        ("plus=a@1e39", &["not a finite number in f32"]),
        (
            r#"plus=a@{"up": {"block_3": 1}}"#,
            &["`up.block_3`", "up.block_0"],
        ),
    ] {
        refused_prompt(&catalogue, prompt, parts);
    }
    let mut given = request(&["plus=a@mask=m"]);
    given.image_prompts.as_mut().unwrap()[0].pictures.clear();
    let error = given.resolve(&catalogue, 0).unwrap_err().to_string();
    assert_says(&error, &["`plus`: has no picture"]);
    let mut given = request(&["plus=a"]);
    given.image_prompts.as_mut().unwrap()[0].scale = Some(ImageScale::Number(f64::NAN));
    let error = given.resolve(&catalogue, 0).unwrap_err().to_string();
    assert_says(&error, &["NaN is not a finite number"]);
    let refiner = Request {
        model: Some("tiny-refiner".into()),
        ..request(&["plus=a"])
    };
    let error = refiner.resolve(&catalogue, 0).unwrap_err().to_string();
    assert_says(
        &error,
        &[
            "no adapter `plus`: the model has none",
            "python -m export adapter",
        ],
    );
}

#[test]
fn prompts_that_no_layer_hears_are_recorded_but_not_worked_on() {
    let catalogue = Adapted::new().catalogue();
    let given = Request {
        refiner: Some("tiny-refiner".into()),
        ..request(&[
            "plus=a@0",
            "plus=b",
            r#"plus=c@{"up": {"block_0": 0}}"#,
            "plus=d@style",
            "plus=e@{}",
            "plus=f,g@0,0@mask=m,n",
            "plus=f,g@0,1@mask=m,n",
            "face=a",
            "both=a@face=b",
        ])
    };
    let resolved = given.resolve(&catalogue, 0).unwrap();
    assert_eq!(resolved.request.image_prompts, given.image_prompts);
    assert_eq!(resolved.image_prompts, [1, 3, 6, 7, 8]);
    let told = resolved
        .image_prompts("tiny")
        .map(|(at, prompt)| (at, prompt.adapter.as_str()));
    let expected = [
        (1, "plus"),
        (3, "plus"),
        (6, "plus"),
        (7, "face"),
        (8, "both"),
    ];
    assert_eq!(told.collect::<Vec<_>>(), expected);
    assert_eq!(resolved.image_prompts("tiny-refiner").count(), 0);
    let without = Request {
        image_prompts: None,
        ..given
    };
    let resolved = without.resolve(&catalogue, 0).unwrap();
    assert_eq!(resolved.image_prompts("tiny").count(), 0);
}

#[test]
fn going_on_from_latents_keeps_the_image_prompts_and_refuses_others() {
    let catalogue = Adapted::new().catalogue();
    let saved = request(&["plus=a@0.5"]);
    let before = saved.resolve(&catalogue, 0).unwrap();
    let go_on = |prompts: Option<Vec<ImagePrompt>>| {
        let over = Request {
            image_prompts: prompts,
            ..Request::default()
        };
        let now = saved.overridden_by(&over).resolve(&catalogue, 0).unwrap();
        now.continues(&before, 2, |_| 0).map(|()| now)
    };
    let same = go_on(None).unwrap();
    assert_eq!(same.request.image_prompts, saved.image_prompts);
    go_on(saved.image_prompts.clone()).unwrap();
    let error = go_on(Some(vec![parsed("plus=a@0.6")])).unwrap_err();
    assert_says(&error.to_string(), &["`image-prompts` cannot change"]);
}
