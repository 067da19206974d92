//! Image prompts: their text form and JSON.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tronie::image::{read_request, write_png};
use tronie::request::{
    BlockScales, Crop, ImagePrompt, ImageScale, NamedScale, Request, Scales, Share, SideScales,
};

fn parsed(text: &str) -> ImagePrompt {
    text.parse().unwrap()
}

fn reason(text: &str) -> String {
    text.parse::<ImagePrompt>().unwrap_err()
}

/// That a message has all of `parts`.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn the_text_form_has_every_part() {
    assert_eq!(
        parsed("plus=a.jpg"),
        ImagePrompt {
            adapter: "plus".into(),
            pictures: vec!["a.jpg".into()],
            ..ImagePrompt::default()
        }
    );
    let text = "plus=C:\\a=b.jpg,d/e.safetensors@-0.5@mask=m.png,n.png@steps=0.25,1@negative=x=y.jpg@crop=pad";
    let whole = ImagePrompt {
        adapter: "plus".into(),
        pictures: vec!["C:\\a=b.jpg".into(), "d/e.safetensors".into()],
        scale: Some(ImageScale::Number(-0.5)),
        masks: vec!["m.png".into(), "n.png".into()],
        steps: Some(Share {
            start: 0.25,
            end: 1.0,
        }),
        negative: Some("x=y.jpg".into()),
        crop: Some(Crop::Pad),
        ..ImagePrompt::default()
    };
    assert_eq!(parsed(text), whole);
    assert_eq!(whole.to_string(), text);
    let parts = "plus=a@crop=stretch@steps=0,0.5@style+layout";
    assert_eq!(
        parsed(parts).to_string(),
        "plus=a@style+layout@steps=0,0.5@crop=stretch"
    );
    let text = "face=a.npy,b.npy@0.7,0.3@mask=m,n@negative=c.npy@face=a.png,b.png@negative-face=c.png@shortcut=1.5";
    let face = ImagePrompt {
        adapter: "face".into(),
        pictures: vec!["a.npy".into(), "b.npy".into()],
        faces: vec!["a.png".into(), "b.png".into()],
        scale: Some(ImageScale::Each(vec![0.7, 0.3])),
        masks: vec!["m".into(), "n".into()],
        negative: Some("c.npy".into()),
        negative_face: Some("c.png".into()),
        shortcut: Some(1.5),
        ..ImagePrompt::default()
    };
    assert_eq!(parsed(text), face);
    assert_eq!(face.to_string(), text);
    assert_eq!(face.files().count(), 8);
    let blocks = r#"plus=a@{"down": {"block_2": [0.0, 1.0]}, "mid": 2}"#;
    let expected = BlockScales {
        down: Some(SideScales::Blocks(
            [("block_2".to_owned(), Scales::Each(vec![0.0, 1.0]))].into(),
        )),
        mid: Some(Scales::One(2.0)),
        up: None,
    };
    assert_eq!(parsed(blocks).scale, Some(ImageScale::Blocks(expected)));
}

#[test]
fn what_is_wrong_with_a_text_form_is_said() {
    for (text, parts) in [
        (
            "",
            &[
                "`` is not NAME=FILE[,FILE…][@SCALE]",
                "[@crop=center|pad|stretch]",
            ][..],
        ),
        ("a.jpg", &["`a.jpg` is not NAME=FILE"]),
        ("=a.jpg", &["`=a.jpg` is not NAME=FILE"]),
        ("plus=", &["empty file name in NAME=FILE[,FILE…]"]),
        ("plus=@0.5", &["empty file name in NAME=FILE"]),
        ("plus=a,,b", &["`a,,b` has an empty file name"]),
        ("plus=a@mask=", &["empty file name in mask=FILE[,FILE…]"]),
        ("plus=a@mask=m,", &["`m,` has an empty file name in mask="]),
        ("plus=a@negative=", &["negative names no file"]),
        ("plus=a@", &["`` is no scale", "style+layout"]),
        ("plus=a@nan", &["`nan` is no scale: a finite number"]),
        ("plus=a@1e999", &["`1e999` is no scale"]),
        (
            "plus=a@b.jpg",
            &["`b.jpg` is no scale", "@ in its name", "JSON"],
        ),
        (
            "plus=a@scale=1",
            &[
                "`scale=1` is not known",
                "SCALE, mask=, steps=, negative=, crop=, face=",
                "JSON",
            ],
        ),
        ("plus=a@1@style", &["has SCALE twice"]),
        ("plus=a@mask=m@mask=m", &["has mask twice"]),
        ("plus=a@steps=0,1@steps=0,1", &["has steps twice"]),
        ("plus=a@negative=m@negative=m", &["has negative twice"]),
        ("plus=a@negative-face=", &["negative-face names no file"]),
        ("plus=a@face=", &["empty file name in face=FILE[,FILE…]"]),
        ("plus=a@face=m@face=m", &["has face twice"]),
        ("plus=a@shortcut=", &["`` is no shortcut: a finite number"]),
        ("plus=a@shortcut=inf", &["`inf` is no shortcut"]),
        ("plus=a@1,x", &["`1,x` is no scale", "0.7,0.3"]),
        ("plus=a@1,", &["`1,` is no scale"]),
        ("plus=a@crop=pad@crop=pad", &["has crop twice"]),
        (
            "plus=a@crop=left",
            &["`left` is not known; known: center, pad, stretch"],
        ),
        ("plus=a@steps=0.5", &["`0.5` is not START,END", "0,0.5"]),
        ("plus=a@steps=0,inf", &["`0,inf` is not START,END"]),
        ("plus=a@{", &["is no scale of blocks", "EOF"]),
    ] {
        assert_says(&reason(text), parts);
    }
}

#[test]
fn what_is_wrong_with_scales_of_blocks_is_said() {
    for (text, parts) in [
        (
            r#"plus=a@{"middle": 1}"#,
            &["unknown field `middle`", "`down`, `mid`, `up`"][..],
        ),
        (
            r#"plus=a@{"mid": "x"}"#,
            &["a number, or a list with one for each of its attentions"],
        ),
        (
            r#"plus=a@{"up": {"block_0": {}}}"#,
            &["the scale of a side is a number"],
        ),
    ] {
        assert_says(&reason(text), parts);
    }
}

#[test]
fn json_says_what_is_wrong_with_a_prompt() {
    let read = |prompt: &str| {
        let text = format!(r#"{{"prompt": "x", "image-prompts": [{prompt}]}}"#);
        Request::from_json(&text, Path::new("r.json"))
    };
    for (prompt, parts) in [
        (r#"{"pictures": ["a"]}"#, &["missing field `adapter`"][..]),
        (r#"{"adapter": "p"}"#, &["missing field `pictures`"]),
        (
            r#"{"adapter": "p", "pictures": [], "weight": 1}"#,
            &["unknown field `weight`", "`scale`", "`negative`"],
        ),
        (
            r#"{"adapter": "p", "pictures": [], "scale": "stile"}"#,
            &["`stile` is no scale", "style"],
        ),
        (
            r#"{"adapter": "p", "pictures": [], "scale": {"middle": 1}}"#,
            &["unknown field `middle`"],
        ),
        (
            r#"{"adapter": "p", "pictures": [], "scale": []}"#,
            &["a scale is a number, a list of one for each masked picture, a name"],
        ),
        (
            r#"{"adapter": "p", "pictures": [], "scale": [1, "x"]}"#,
            &["a scale is a number"],
        ),
        (r#"{"adapter": "p", "pictures": [], "scale": [1]}"#, &[]),
        (r#"{"adapter": "p", "pictures": [], "scale": null}"#, &[]),
        (
            r#"{"adapter": "p", "pictures": [], "crop": "left"}"#,
            &["unknown variant `left`", "`center`, `pad`, `stretch`"],
        ),
        (
            r#"{"adapter": "p", "pictures": [], "steps": [0.5]}"#,
            &["length 1"],
        ),
    ] {
        match read(prompt) {
            Ok(_) => assert!(parts.is_empty(), "{prompt} is read"),
            Err(error) => assert_says(&error.to_string(), parts),
        }
    }
}

#[test]
fn a_request_brings_its_image_prompts_back_from_json_and_from_a_picture() {
    let request = Request {
        prompt: "x".into(),
        image_prompts: Some(vec![
            parsed("plus=a.jpg,b.jpg@0.7@mask=m.png,n.png@steps=0,0.5@negative=n.jpg@crop=center"),
            parsed("base=c.safetensors@style+layout"),
            parsed("face=c.npy,d.npy@0.5,0.25@mask=m,n@face=c.png,d.png@shortcut=0"),
            parsed(r#"base=d.jpg@{"down": 0.1, "mid": [2], "up": {"block_0": [0, 1, 0]}}"#),
        ]),
        ..Request::default()
    };
    let json = serde_json::to_string(&request).unwrap();
    assert_says(
        &json,
        &[
            r#""image-prompts":[{"adapter":"plus","pictures":["a.jpg","b.jpg"],"scale":0.7,"masks":["m.png","n.png"],"steps":[0.0,0.5],"negative":"n.jpg","crop":"center"}"#,
            r#"{"adapter":"base","pictures":["c.safetensors"],"scale":"style+layout"}"#,
            r#""pictures":["c.npy","d.npy"],"faces":["c.png","d.png"],"scale":[0.5,0.25],"masks":["m","n"],"shortcut":0.0}"#,
            r#""scale":{"down":0.1,"mid":[2.0],"up":{"block_0":[0.0,1.0,0.0]}}"#,
        ],
    );
    assert_eq!(
        Request::from_json(&json, Path::new("r.json")).unwrap(),
        request
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    let mut bytes = Vec::new();
    write_png(&mut bytes, &image::RgbImage::new(2, 2), &request).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(read_request(&path).unwrap(), request);
}

#[test]
fn a_file_that_is_not_there_is_named_with_the_way_around_separators() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().join("a");
    std::fs::write(&here, "").unwrap();
    let here = here.display().to_string();
    parsed(&format!("plus={here}@mask={here}@negative={here}"))
        .check_files()
        .unwrap();
    for text in [
        format!("plus={here},{here}b"),
        format!("plus={here}@mask={here}b"),
        format!("plus={here}@negative={here}b"),
    ] {
        let error = parsed(&text).check_files().unwrap_err();
        assert_eq!(error.code(), 3);
        let missing = format!("{here}b");
        assert_says(
            &error.to_string(),
            &[&missing, "`@` and `,`", "`image-prompts`"],
        );
    }
}

fn number() -> impl Strategy<Value = f64> {
    proptest::num::f64::NORMAL | proptest::num::f64::ZERO | proptest::num::f64::SUBNORMAL
}

fn scales() -> impl Strategy<Value = Scales> {
    prop_oneof![
        number().prop_map(Scales::One),
        prop::collection::vec(number(), 0..4).prop_map(Scales::Each),
    ]
}

fn side() -> impl Strategy<Value = SideScales> {
    prop_oneof![
        scales().prop_map(SideScales::All),
        prop::collection::btree_map("block_[0-9]|[^@]{0,3}", scales(), 0..4)
            .prop_map(SideScales::Blocks),
    ]
}

fn image_scale() -> impl Strategy<Value = ImageScale> {
    let option = prop::option::of::<proptest::strategy::BoxedStrategy<SideScales>>;
    let blocks = (
        option(side().boxed()),
        prop::option::of(scales()),
        option(side().boxed()),
    );
    prop_oneof![
        number().prop_map(ImageScale::Number),
        Just(ImageScale::Named(NamedScale::Style)),
        Just(ImageScale::Named(NamedScale::Layout)),
        Just(ImageScale::Named(NamedScale::StyleLayout)),
        prop::collection::vec(number(), 2..4).prop_map(ImageScale::Each),
        blocks.prop_map(|(down, mid, up)| ImageScale::Blocks(BlockScales { down, mid, up })),
    ]
}

fn image_prompt() -> impl Strategy<Value = ImagePrompt> {
    let file = || "[^@,]{1,8}".prop_map(PathBuf::from);
    let crop = prop_oneof![Just(Crop::Center), Just(Crop::Pad), Just(Crop::Stretch)];
    let share = (number(), number()).prop_map(|(start, end)| Share { start, end });
    let option = prop::option::of;
    (
        "[^=]{1,5}",
        prop::collection::vec(file(), 1..4),
        prop::option::of(image_scale()),
        prop::collection::vec(file(), 0..3),
        prop::option::of(share),
        option(file()),
        prop::option::of(crop),
        (
            prop::collection::vec(file(), 0..3),
            option(file()),
            prop::option::of(number()),
        ),
    )
        .prop_map(
            |(adapter, pictures, scale, masks, steps, negative, crop, of_faces)| {
                let (faces, negative_face, shortcut) = of_faces;
                ImagePrompt {
                    adapter,
                    pictures,
                    faces,
                    scale,
                    masks,
                    steps,
                    negative,
                    negative_face,
                    crop,
                    shortcut,
                }
            },
        )
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*", name in "[a-z=@]{0,3}") {
        for text in [text.clone(), format!("{name}={text}"), format!("a=b@{text}"), format!("a=b@{{{text}")] {
            if let Ok(prompt) = text.parse::<ImagePrompt>() {
                prop_assert_eq!(prompt.to_string().parse::<ImagePrompt>().unwrap(), prompt);
            }
        }
    }

    #[test]
    fn parts_in_any_order_are_read_or_refused(
        parts in prop::collection::vec("[a-z0-9.,=-]{0,6}|mask=[a-z,]{0,3}|steps=[0-9.,]{0,5}|crop=(pad|center)|negative=[a-z]?|(negative-)?face=[a-z,]{0,3}|shortcut=[0-9.]{0,3}|0[.][0-9](,[0-9])?|\\{\"(up|mid)\":[0-9]\\}", 0..5)
    ) {
        let text = format!("a={}", parts.join("@"));
        if let Ok(prompt) = text.parse::<ImagePrompt>() {
            prop_assert_eq!(prompt.to_string().parse::<ImagePrompt>().unwrap(), prompt);
        }
    }

    #[test]
    fn a_prompt_comes_back_from_its_text_and_from_json(prompt in image_prompt()) {
        prop_assert_eq!(&prompt.to_string().parse::<ImagePrompt>().unwrap(), &prompt);
        let json = serde_json::to_string(&prompt).unwrap();
        prop_assert_eq!(&serde_json::from_str::<ImagePrompt>(&json).unwrap(), &prompt);
    }
}
