//! Image prompts on the command line: what they do, what is refused.

use image::{Rgb, RgbImage};

use crate::workshop::Workshop;

/// A workshop with the pictures `a.png`, `b.png` and masks of the left and the right half.
fn gallery() -> Workshop {
    let w = Workshop::new();
    let picture = |width, height, step: u32| {
        RgbImage::from_fn(width, height, |x, y| {
            Rgb([
                (x * step) as u8,
                (y * 3) as u8,
                ((x / 9 + y / 7) * 40) as u8,
            ])
        })
    };
    std::fs::create_dir(w.path("pictures")).unwrap();
    let mask = |left| {
        RgbImage::from_fn(64, 64, |x, _| {
            Rgb([if (x < 32) == left { 255 } else { 0 }; 3])
        })
    };
    for (name, picture) in [
        ("a", picture(80, 60, 3)),
        ("b", picture(50, 90, 11)),
        ("left", mask(true)),
        ("right", mask(false)),
    ] {
        picture
            .save(w.path(&format!("pictures/{name}.png")))
            .unwrap();
    }
    w
}

/// The picture that image prompts and other arguments lead to.
fn painted(w: &Workshop, prompts: &[&str], more: &[&str]) -> Vec<u8> {
    let flags = prompts
        .iter()
        .flat_map(|prompt| ["--image-prompt", *prompt]);
    let flags = flags
        .chain(more.iter().copied())
        .chain(["--output", "o.png"]);
    let output = w.generate(&flags.collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    image::open(w.path("o.png")).unwrap().to_rgb8().into_raw()
}

#[test]
fn a_scale_of_zero_is_no_image_prompt_bit_for_bit_and_loads_nothing() {
    let w = gallery();
    let without = painted(&w, &[], &[]);
    assert_eq!(
        painted(&w, &["ip-adapter-plus=pictures/a.png@0"], &[]),
        without
    );
    let output = w.generate(&[
        "--image-prompt",
        "ip-adapter-plus=pictures/a.png@0",
        "--output",
        "o.png",
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !said.contains("unet_image") && !said.contains("image_encoder"),
        "{said}"
    );
    assert_ne!(
        painted(&w, &["ip-adapter-plus=pictures/a.png@0.5"], &[]),
        without
    );
}

#[test]
fn an_image_prompt_rules_in_its_steps_only() {
    let w = gallery();
    let latents = |prompt: &str, stop: &str| {
        let output = w.generate(&[
            "--image-prompt",
            prompt,
            "--stop-at",
            stop,
            "--latents-out",
            "l.safetensors",
        ]);
        assert!(output.status.success(), "{output:?}");
        let bytes = std::fs::read(w.path("l.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensor("latents").unwrap().data().to_vec()
    };
    let nothing = "ip-adapter=pictures/a.png@0";
    let late = "ip-adapter=pictures/a.png@steps=0.5,1";
    assert_eq!(latents(late, "2"), latents(nothing, "2"));
    assert_ne!(latents(late, "3"), latents(nothing, "3"));
    let early = "ip-adapter=pictures/a.png@steps=0,0.5";
    assert_ne!(latents(early, "1"), latents(nothing, "1"));
    assert_ne!(
        latents(early, "4"),
        latents("ip-adapter=pictures/a.png", "4")
    );
}

#[test]
fn saved_embeddings_are_the_picture_bit_for_bit_and_load_no_encoder() {
    let w = gallery();
    let embed = w.tronie(&[
        "embed",
        "pictures/a.png",
        "--adapter",
        "ip-adapter",
        "--model",
        "tiny",
    ]);
    let embed = { embed }.output().unwrap();
    assert!(embed.status.success(), "{embed:?}");
    let saved = "pictures/a.safetensors";
    assert!(w.path(saved).is_file());
    let mode = ["--memory", "balanced"];
    for adapter in ["ip-adapter", "ip-adapter-plus"] {
        let from_picture = painted(&w, &[&format!("{adapter}=pictures/a.png")], &mode);
        let from_saved = painted(&w, &[&format!("{adapter}={saved}")], &mode);
        assert!(from_picture == from_saved, "{adapter}");
    }
    // With guidance too: what is seen in nothing lies in the file.
    let prompts = ["ip-adapter", "ip-adapter-plus"].map(|adapter| format!("{adapter}={saved}"));
    let [first, second] = prompts.each_ref().map(String::as_str);
    let output = w.generate(&["--image-prompt", first, "--image-prompt", second]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !said.contains("image_encoder"),
        "{said}"
    );
}

/// An identity as wide as the tiny's adapter wants it, in the format of `numpy.save`.
fn write_identity(w: &Workshop, name: &str, value: f32) {
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (16,), }\n";
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    let values = [value; 16].map(f32::to_le_bytes).concat();
    let parts = [
        b"\x93NUMPY\x01\x00",
        &length[..],
        header.as_bytes(),
        &values,
    ];
    std::fs::write(w.path(&format!("pictures/{name}")), parts.concat()).unwrap();
}

#[test]
fn an_identity_is_an_image_prompt_and_loads_no_encoder() {
    let w = gallery();
    write_identity(&w, "me.npy", 0.25);
    write_identity(&w, "other.npy", -0.25);
    let values = [0.25_f32; 16].map(f32::to_le_bytes).concat();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 16], &values);
    let file = safetensors::serialize([("anything", view.unwrap())], None).unwrap();
    std::fs::write(w.path("pictures/me.safetensors"), file).unwrap();
    let me = painted(&w, &["ip-adapter-faceid=pictures/me.npy"], &[]);
    let same = painted(&w, &["ip-adapter-faceid=pictures/me.safetensors"], &[]);
    assert!(me == same);
    let other = painted(&w, &["ip-adapter-faceid=pictures/other.npy"], &[]);
    assert!(me != other && me != painted(&w, &[], &[]));
    let both = "ip-adapter-faceid=pictures/me.npy,pictures/other.npy@mask=pictures/left.png,pictures/right.png";
    let one_scale = painted(&w, &[&format!("{both}@0.5")], &[]);
    assert!(one_scale == painted(&w, &[&format!("{both}@0.5,0.5")], &[]));
    assert!(one_scale != painted(&w, &[&format!("{both}@0.5,0.75")], &[]));
    let negative = "ip-adapter-faceid=pictures/me.npy@negative=pictures/other.npy";
    let output = w.generate(&["--image-prompt", negative]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !said.contains("image_encoder"),
        "{said}"
    );
}

#[test]
fn what_is_no_identity_is_refused_before_a_network_is_loaded() {
    let w = gallery();
    write_identity(&w, "long.npy", 2.5);
    for (file, parts) in [
        (
            "a.png",
            &[
                "a.png",
                "cannot be found in pictures yet",
                "normed_embedding",
            ][..],
        ),
        ("long.npy", &["long.npy", "length 10.0000, not 1"]),
    ] {
        let output = w.generate(&[
            "--image-prompt",
            &format!("ip-adapter-faceid=pictures/{file}"),
        ]);
        w.assert_fails(&output, 3, parts);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("loading"), "{said}");
    }
    let embed = ["embed", "pictures/a.png", "--model", "tiny", "--adapter"];
    let output = w
        .tronie(&[&embed[..], &["ip-adapter-faceid"]].concat())
        .output();
    w.assert_fails(&output.unwrap(), 2, &["sees no pictures"]);
}

#[test]
fn a_picture_with_image_prompts_repeats_itself_and_goes_on_from_its_latents() {
    let w = gallery();
    let prompts = [
        "ip-adapter-plus-face=pictures/a.png,pictures/b.png@0.95@mask=pictures/left.png,pictures/right.png",
        "ip-adapter-plus=pictures/b.png@0.3@steps=0,0.75@negative=pictures/a.png@crop=pad",
    ];
    let refined = [
        "--refiner",
        "tiny-refiner",
        "--refine-at",
        "0.5",
        "--batch",
        "1",
    ];
    let whole = painted(&w, &prompts, &refined);
    std::fs::rename(w.path("o.png"), w.path("first.png")).unwrap();
    let again = w.tronie(&[
        "generate",
        "--request",
        "first.png",
        "--output",
        "again.png",
    ]);
    assert!({ again }.status().unwrap().success());
    let open = |name: &str| image::open(w.path(name)).unwrap().to_rgb8().into_raw();
    assert!(open("again.png") == whole);
    let stop = ["--stop-at", "1", "--latents-out", "l.safetensors"];
    let flags = prompts
        .iter()
        .flat_map(|prompt| ["--image-prompt", *prompt]);
    let flags = flags.chain(refined).chain(stop).collect::<Vec<_>>();
    assert!(w.generate(&flags).status.success());
    let on = w.tronie(&[
        "generate",
        "--latents-in",
        "l.safetensors",
        "--output",
        "on.png",
    ]);
    assert!({ on }.status().unwrap().success());
    assert!(open("on.png") == whole);
}

#[test]
fn an_unknown_adapter_is_refused_and_the_known_are_listed() {
    let w = gallery();
    let known = "no adapter `plus`; the model has: ip-adapter, ip-adapter-faceid, ip-adapter-plus, ip-adapter-plus-face";
    let flags = ["--image-prompt", "plus=pictures/a.png"];
    w.assert_fails(&w.generate(&flags), 2, &["image-prompt", known]);
}

#[test]
fn every_image_prompt_of_the_command_line_is_read() {
    let w = gallery();
    let second = |form: &str| {
        let first = ["--image-prompt", "ip-adapter=pictures/a.png"];
        w.generate(&[&first[..], &["--image-prompt", form]].concat())
    };
    for (form, code, parts) in [
        (
            "ip-adapter",
            2,
            &["`ip-adapter` is not NAME=FILE", "--image-prompt"][..],
        ),
        (
            "ip-adapter=pictures/a.png@2,x",
            2,
            &["`2,x` is no scale", "style+layout"],
        ),
        (
            "ip-adapter=pictures/a.png@2,3",
            2,
            &["has 2 scales for 0 masks"],
        ),
        ("ip-adapter=pictures/a.png@NaN", 2, &["`NaN` is no scale"]),
        (
            "ip-adapter=pictures/a.png,c.png",
            3,
            &["c.png", "not there", "JSON"],
        ),
        (
            "ip-adapter=pictures/a.png,pictures/b.png@mask=pictures/left.png",
            2,
            &["1 masks for 2 pictures"],
        ),
        (
            r#"ip-adapter=pictures/a.png@{"up": {"block_7": 1}}"#,
            2,
            &["`up.block_7`", "up.block_0", "mid"],
        ),
    ] {
        w.assert_fails(&second(form), code, parts);
    }
}

#[test]
fn files_that_are_no_pictures_are_refused_before_a_network_is_loaded() {
    let w = gallery();
    let png = std::fs::read(w.path("pictures/a.png")).unwrap();
    // A header of 100,000 × 100,000 pixels, and a damaged one at that; `tests/pictures.rs` has whole ones.
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
    let embedding = |encoder: &str| {
        let data = [0_u8; 4];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 1], &data);
        let metadata = [("tronie.image_encoder".to_owned(), encoder.to_owned())].into();
        safetensors::serialize([("image_embeds", view.unwrap())], Some(metadata)).unwrap()
    };
    for (name, bytes, parts) in [
        ("empty.png", Vec::new(), &["empty.png"][..]),
        ("cut.png", png[..png.len() / 2].to_vec(), &["cut.png"]),
        (
            "text.png",
            b"no picture".to_vec(),
            &["text.png", "PNG, JPEG"],
        ),
        ("bomb.png", bomb, &["bomb.png"]),
        (
            "cut.safetensors",
            vec![8, 0, 0],
            &["cut.safetensors", "not a whole"],
        ),
        (
            "other.safetensors",
            embedding("vit-g"),
            &["made by the image encoder `vit-g`", "`image_encoder`"],
        ),
        (
            "half.safetensors",
            embedding("image_encoder"),
            &["half.safetensors", "hidden_states"],
        ),
    ] {
        let path = format!("pictures/{name}");
        std::fs::write(w.path(&path), bytes).unwrap();
        let output = w.generate(&["--image-prompt", &format!("ip-adapter={path}")]);
        w.assert_fails(&output, 3, parts);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("loading"), "{said}");
        let mask = format!("ip-adapter=pictures/a.png@mask={path}");
        let output = w.generate(&["--image-prompt", &mask]);
        w.assert_fails(&output, 3, &[name]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("loading"), "{said}");
    }
}
