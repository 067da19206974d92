//! What is no whole SDXL model in one file is refused by its name, with a remedy.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tronie::checkpoint;
use tronie::manifest::Catalogue;
use tronie::{Error, Request};

use crate::ROOT;
use crate::original_layout::{Stored, Whole};

/// A name, a file, and parts of what is said of it.
type Case<'a> = (&'a str, Whole, &'a [&'a str]);

/// Opens a file that a request names in place of a model.
fn opened(name: &str) -> Result<(), Error> {
    let catalogue = Catalogue::load(Path::new(ROOT).join("tests/models/models.yaml")).unwrap();
    let request = Request {
        model: Some(name.into()),
        ..Request::default()
    };
    checkpoint::open(&catalogue, &request)?;
    catalogue.model("model", name).map(drop)
}

fn all_refused(cases: &[Case<'_>]) {
    let folder = TempDir::new().unwrap();
    for (name, whole, parts) in cases {
        let path = folder.path().join(format!("{name}.safetensors"));
        refused(whole.save(&path).to_str().unwrap(), parts);
    }
}

/// A model with one tensor more.
fn and(name: &str) -> Whole {
    let mut whole = Whole::of("tiny");
    whole.mark(name);
    whole
}

/// A model of which some tensors are left.
fn only(prefix: &'static str, new: &'static str) -> Whole {
    let mut whole = Whole::of("tiny");
    whole.rename(|name| name.strip_prefix(prefix).map(|rest| format!("{new}{rest}")));
    whole
}

/// A model without some tensors.
fn without(prefixes: &[&str]) -> Whole {
    let mut whole = Whole::of("tiny");
    whole.retain(|name| !prefixes.iter().any(|prefix| name.starts_with(prefix)));
    whole
}

/// A model whose tensor is changed.
fn with(name: &str, change: impl Fn(&mut Stored)) -> Whole {
    let mut whole = Whole::of("tiny");
    change(whole.tensors.get_mut(name).unwrap());
    whole
}

fn channels(count: usize) -> Whole {
    let first = "model.diffusion_model.input_blocks.0.0.weight";
    with(first, |stored| {
        let one = stored.bytes.len() / stored.shape[1];
        stored.shape[1] = count;
        stored.bytes = vec![0; one * count];
    })
}

fn eight_bits() -> Whole {
    let name = "model.diffusion_model.out.2.weight";
    with(name, |stored| {
        stored.dtype = "F8_E4M3";
        stored.bytes.truncate(stored.bytes.len() / 2);
    })
}

fn diffusers_alone(component: &str) -> PathBuf {
    let folder = Path::new(ROOT).join("tests/models/tiny").join(component);
    let mut files = std::fs::read_dir(folder).unwrap().flatten();
    let weights = files.find(|f| f.path().extension().is_some_and(|e| e == "safetensors"));
    weights.unwrap().path()
}

#[test]
fn what_is_no_sdxl_model_is_refused_by_its_name_with_a_remedy() {
    let cases: &[Case<'_>] = &[
        (
            "inpainting",
            channels(9),
            &["an inpainting model", "9 channels", "text-to-image"],
        ),
        ("editing", channels(8), &["InstructPix2Pix", "8 channels"]),
        (
            "sd1",
            and("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
            &["a Stable Diffusion 1 model", "only SDXL"],
        ),
        (
            "sd2",
            and("cond_stage_model.model.ln_final.bias"),
            &["a Stable Diffusion 2 model", "only SDXL"],
        ),
        (
            "sd3",
            and("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
            &["a Stable Diffusion 3 model", "only SDXL"],
        ),
        (
            "flux",
            and("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
            &["a Flux model", "only SDXL"],
        ),
        (
            "kohya",
            only("model.", "lora_unet_"),
            &["a LoRA", "--lora FILE"],
        ),
        (
            "peft",
            and("unet.conv_in.lora_A.weight"),
            &["a LoRA", "--lora FILE"],
        ),
        (
            "adapter",
            and("ip_adapter.1.to_k_ip.weight"),
            &["an IP-Adapter", "export adapter"],
        ),
        (
            "control",
            and("control_model.input_blocks.0.0.weight"),
            &["a ControlNet"],
        ),
        (
            "embedding",
            and("clip_g"),
            &["a textual inversion embedding"],
        ),
        ("cosxl", and("edm_vpred.sigma_max"), &["a CosXL model"]),
        (
            "playground",
            and("edm_mean"),
            &["normalised channel by channel", "export model"],
        ),
    ];
    all_refused(cases);
}

#[test]
fn what_is_a_part_of_a_model_is_refused_with_what_it_lacks() {
    let cases: &[Case<'_>] = &[
        (
            "unet",
            only("model.diffusion_model.", ""),
            &["a UNet alone, in the original layout", "a whole model"],
        ),
        (
            "prefixed",
            only("model.diffusion_model.", "model.diffusion_model."),
            &[
                "has no first text encoder",
                "has no OpenCLIP text encoder",
                "has no VAE",
                "`like: tiny`",
                "`checkpoint: FILE`",
            ],
        ),
        (
            "vae",
            only("first_stage_model.", ""),
            &["a VAE alone, in the original layout", "a whole model"],
        ),
    ];
    all_refused(cases);
}

#[test]
fn what_lacks_tensors_or_has_others_is_refused_with_what_is_amiss() {
    let cases: &[Case<'_>] = &[
        (
            "blind",
            without(&["first_stage_model."]),
            &["has no VAE", "first_stage_model.…"],
        ),
        (
            "mute",
            without(&["conditioner.embedders.0."]),
            &[
                "has no first text encoder",
                "conditioner.embedders.0.transformer.…",
            ],
        ),
        (
            "fp8",
            eight_bits(),
            &["F8_E4M3", "`conv_out.weight`", "f16, bf16 or f32 file"],
        ),
        (
            "lacking",
            without(&["model.diffusion_model.out.2.bias"]),
            &[
                "fits no model of",
                "`tiny`: has no tensor `conv_out.bias`",
                "export model",
            ],
        ),
        (
            "strange",
            only("first_stage_model.encoder.", "x."),
            &["no checkpoint that is known"],
        ),
    ];
    all_refused(cases);
}

fn refused(file: &str, parts: &[&str]) {
    let error = opened(file).unwrap_err();
    assert_eq!(error.code(), 4, "{error}");
    let message = error.to_string();
    for part in parts.iter().chain(&[file]) {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn a_component_in_the_diffusers_layout_is_refused_with_its_place_in_the_catalogue() {
    for (component, parts) in [
        (
            "unet",
            &[
                "a UNet alone, in the diffusers layout",
                "`like:`",
                "weights: {unet: […]}",
            ][..],
        ),
        (
            "vae",
            &[
                "a VAE alone, in the diffusers layout",
                "weights: {vae: […]}",
            ],
        ),
        ("text_encoder_2", &["a text encoder alone"]),
    ] {
        refused(diffusers_alone(component).to_str().unwrap(), parts);
    }
}

#[test]
fn what_is_no_file_or_no_safetensors_is_refused() {
    let folder = TempDir::new().unwrap();
    let pickle = folder.path().join("model.ckpt");
    std::fs::write(&pickle, b"PK\x03\x04 and so on").unwrap();
    refused(pickle.to_str().unwrap(), &["zip archive", ".safetensors"]);
    let absent = folder.path().join("absent.safetensors");
    let error = opened(absent.to_str().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let unknown = opened("no-such-model").unwrap_err().to_string();
    for part in [
        "no model `no-such-model`",
        "no file of that name",
        "known: tiny",
    ] {
        assert!(unknown.contains(part), "no {part:?} in: {unknown}");
    }
    refused(folder.path().to_str().unwrap(), &["is a directory"]);
}
