//! Files that are no LoRA, LoRAs for other models, and broken ones: each is refused with what is wrong and what to do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::safetensors_file::{f32_bytes, raw, well_formed};
use tronie::Error;
use tronie::lora::LoraFile;
use tronie::model_file::ModelFile;

fn reason(bytes: Vec<u8>) -> String {
    match LoraFile::from_bytes("adapter.safetensors", bytes) {
        Err(Error::Weights { path, reason }) => {
            assert_eq!(path.to_str(), Some("adapter.safetensors"));
            reason
        }
        other => panic!("an error about weights was expected, not {other:?}"),
    }
}

/// A file of ones.
fn ones(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let data: Vec<_> = tensors
        .iter()
        .map(|(_, shape)| f32_bytes(&vec![1.0; shape.iter().product()]))
        .collect();
    let entries = tensors.iter().zip(&data);
    let entries: Vec<_> = entries
        .map(|((n, s), d)| (*n, "F32", *s, d.as_slice()))
        .collect();
    well_formed(&entries, 0)
}

/// A file with one alpha, of some type.
fn alpha(dtype: &str, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let values = f32_bytes(&[1.0; 4]);
    well_formed(
        &[
            (
                "lora_unet_conv_in.lora_down.weight",
                "F32",
                &[1, 4],
                &values,
            ),
            ("lora_unet_conv_in.lora_up.weight", "F32", &[4, 1], &values),
            ("lora_unet_conv_in.alpha", dtype, shape, bytes),
        ],
        0,
    )
}

fn assert_refused(cases: &[(&str, Vec<u8>, &str)]) {
    for (label, bytes, expected) in cases {
        let found = reason(bytes.clone());
        assert!(
            found.contains(expected),
            "{label}: expected `{expected}` in `{found}`"
        );
        assert!(found.len() < 700, "{label}: {found}");
    }
}

#[test]
#[rustfmt::skip]
fn other_things_are_named() {
    let one = |name| ones(&[(name, &[1, 1])]);
    assert_refused(&[
        ("no tensors", ones(&[]), "holds no tensors"),
        ("checkpoint", one("model.diffusion_model.input_blocks.0.0.weight"), "holds no LoRA; it is a whole model in one file"),
        ("UNet", one("down_blocks.0.resnets.0.conv1.weight"), "a UNet's own weights"),
        ("text encoder", one("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder's own weights"),
        ("embedding", one("clip_g"), "a textual inversion"),
        ("ControlNet", one("controlnet_down_blocks.0.weight"), "a ControlNet"),
        ("IP-Adapter", one("ip_adapter.1.to_k_ip.weight"), "holds an IP-Adapter, not a LoRA"),
        ("IP-Adapter with LoRA", one("ip_adapter.0.to_q_lora.down.weight"), "holds an IP-Adapter, not a LoRA"),
        ("anything", one("some.weight"), "none of its 1 tensors has a name that one has; the first is `some.weight`"),
        ("pickle", b"\x80\x02}q\x00.".to_vec(), "is a Python pickle"),
        ("web page", b"<!DOCTYPE html><html>".to_vec(), "is a web page"),
    ]);
}

#[test]
#[rustfmt::skip]
fn other_families_are_named() {
    let pair = |down: &str, up: &str| ones(&[(down, &[1, 1]), (up, &[1, 1])]);
    let kohya = |name: &str| pair(&format!("{name}.lora_down.weight"), &format!("{name}.lora_up.weight"));
    let peft = |name: &str| pair(&format!("{name}.lora_A.weight"), &format!("{name}.lora_B.weight"));
    let told = |key: &str, value: &str| {
        let entry = |name: &str, from: usize| format!(r#""{name}":{{"dtype":"F32","shape":[1,1],"data_offsets":[{from},{}]}}"#, from + 4);
        let (a, b) = (entry("unet.conv_in.lora_A.weight", 0), entry("unet.conv_in.lora_B.weight", 4));
        raw(&format!(r#"{{"__metadata__":{{"{key}":"{value}"}},{a},{b}}}"#), &[0; 8])
    };
    let old = "for Stable Diffusion 1 or 2 (the names of its tensors tell), and only those for SDXL can be used";
    assert_refused(&[
        ("SD1 UNet", kohya("lora_unet_down_blocks_0_attentions_0_proj_in"), old),
        ("SD1 UNet, last block", kohya("lora_unet_up_blocks_3_attentions_2_proj_in"), old),
        ("SD1 original names", kohya("lora_unet_input_blocks_1_1_proj_in"), old),
        ("SD1 text encoder", kohya("lora_te_text_model_encoder_layers_0_mlp_fc1"), old),
        ("SD1 PEFT", peft("unet.down_blocks.0.attentions.0.proj_in"), old),
        ("Flux kohya", kohya("lora_unet_double_blocks_0_img_attn_qkv"), "for Flux"),
        ("Flux PEFT", peft("transformer.single_transformer_blocks.0.proj_mlp"), "for a diffusion transformer, such as Flux"),
        ("SD3", kohya("lora_unet_joint_blocks_0_x_block_attn_qkv"), "for Stable Diffusion 3"),
        ("SD3 text encoder", peft("text_encoder_3.encoder.block.0.layer"), "for Stable Diffusion 3 or Flux"),
        ("Cascade", kohya("lora_prior_unet_down_blocks_0"), "for Stable Cascade"),
        ("video", peft("diffusion_model.blocks.0.self_attn.q"), "for a diffusion transformer, such as those of video"),
        ("metadata of kohya", told("ss_base_model_version", "sd_v1"), "for Stable Diffusion 1 (its metadata tell)"),
        ("metadata of ModelSpec", told("modelspec.architecture", "stable-diffusion-xl-v1-refiner/lora"), "for the SDXL refiner"),
    ]);
    let lora = told("ss_base_model_version", "sdxl_base_v1-0");
    LoraFile::from_bytes("adapter", lora).unwrap();
}

#[test]
#[rustfmt::skip]
fn parts_that_do_not_belong_together_are_refused() {
    let m = |ending: &str| format!("lora_unet_conv_in.{ending}");
    let of = |parts: &[(&str, &[usize])]| {
        let named: Vec<_> = parts.iter().map(|(ending, shape)| (m(ending), *shape)).collect();
        ones(&named.iter().map(|(name, shape)| (name.as_str(), *shape)).collect::<Vec<_>>())
    };
    let (down, up) = ("lora_down.weight", "lora_up.weight");
    assert_refused(&[
        ("no up", of(&[(down, &[2, 4])]), "module `lora_unet_conv_in`: has `lora_unet_conv_in.lora_down.weight` and no `lora_up.weight`: the file is not whole"),
        ("no down", of(&[(up, &[2, 4])]), "and no `lora_down.weight`"),
        ("alpha alone", of(&[("alpha", &[])]), "holds no LoRA"),
        ("core alone", of(&[("lora_mid.weight", &[1, 1, 3, 3])]), "and no `lora_down.weight`"),
        ("half of LoHa", of(&[("hada_w1_a", &[4, 2]), ("hada_w1_b", &[2, 4])]), "has no `hada_w2_a`"),
        ("half of LoKr", of(&[("lokr_w2", &[4, 2])]), "has no `lokr_w1`"),
        ("rank mismatch", of(&[(down, &[2, 4]), (up, &[4, 3])]), "tensors `lora_unet_conv_in.lora_up.weight` of shape [4, 3] and `lora_unet_conv_in.lora_down.weight` of shape [2, 4] have ranks 3 and 2, which must be equal"),
        ("rank zero", of(&[(down, &[0, 4]), (up, &[4, 0])]), "have rank zero"),
        ("vector", of(&[(down, &[4]), (up, &[4, 4])]), "`lora_unet_conv_in.lora_down.weight` of shape [4] is not a matrix"),
        ("kernel above", of(&[(down, &[1, 4]), (up, &[4, 1, 3, 3])]), "has a kernel, and only the down projection may"),
        ("core of other rank", of(&[(down, &[2, 4]), (up, &[4, 2]), ("lora_mid.weight", &[2, 3, 3, 3])]), "does not fit between"),
        ("LoHa of two shapes", of(&[("hada_w1_a", &[4, 1]), ("hada_w1_b", &[1, 4]), ("hada_w2_a", &[4, 1]), ("hada_w2_b", &[1, 5])]), "differ in shape"),
        ("LoKr of two ranks", of(&[("lokr_w1_a", &[2, 1]), ("lokr_w1_b", &[1, 2]), ("lokr_w2_a", &[2, 2]), ("lokr_w2_b", &[2, 2])]), "ranks 1 and 2, which must be equal"),
        ("factor twice", of(&[("lokr_w1", &[2, 2]), ("lokr_w2", &[2, 2]), ("lokr_w2_a", &[2, 2]), ("lokr_w2_b", &[2, 2])]), "of which one is enough"),
        ("two forms", of(&[(down, &[2, 4]), (up, &[4, 2]), ("diff", &[4, 4])]), "parts of two forms"),
        ("magnitudes of nothing", of(&[("dora_scale", &[4, 1])]), "no weights that it belongs to"),
        ("magnitudes of another count", of(&[(down, &[2, 4]), (up, &[4, 2]), ("dora_scale", &[3, 1])]), "neither one for each of the 4 outputs"),
        ("one part twice", ones(&[("unet.a.to_k.lora.up.weight", &[1, 1]), ("unet.a.processor.to_k_lora.up.weight", &[1, 1])]), "are the same part of one module"),
    ]);
}

#[test]
#[rustfmt::skip]
fn alphas_and_values_must_be_numbers() {
    let f32s = |value: f32| value.to_le_bytes().to_vec();
    let nan = |dtype, bytes: &[u8]| well_formed(&[
        ("lora_unet_conv_in.lora_down.weight", dtype, &[1, 2], bytes),
        ("lora_unet_conv_in.lora_up.weight", "F32", &[1, 1], &f32s(1.0)),
    ], 0);
    let fp8 = well_formed(&[
        ("lora_unet_conv_in.lora_down.weight", "F8_E4M3", &[1, 1], &[1]),
        ("lora_unet_conv_in.lora_up.weight", "F32", &[1, 1], &f32s(1.0)),
    ], 0);
    assert_refused(&[
        ("alpha NaN", alpha("F32", &[], &f32s(f32::NAN)), "alpha `lora_unet_conv_in.alpha` is NaN, and must be finite and not zero"),
        ("alpha infinite", alpha("F16", &[], &[0, 0x7c]), "is inf"),
        ("alpha zero", alpha("BF16", &[1], &[0, 0]), "is 0, and must be finite and not zero"),
        ("alpha of two", alpha("F32", &[2], &[0; 8]), "is F32 of shape [2], and must be one number"),
        ("alpha of a byte", alpha("U8", &[], &[4]), "is U8 of shape [], and must be one number"),
        ("NaN", nan("F32", &[f32s(1.0), f32s(f32::NAN)].concat()), "tensor `lora_unet_conv_in.lora_down.weight` is not finite (NaN or infinite) at value 1"),
        ("infinite f16", nan("F16", &[0, 0xfc, 0, 0]), "is not finite (NaN or infinite) at value 0"),
        ("NaN bf16", nan("BF16", &[0, 0, 0x81, 0x7f]), "is not finite (NaN or infinite) at value 1"),
        ("f8", fp8, "is stored as F8_E4M3, and only F32, F16 and BF16 can be used"),
    ]);
    for good in [alpha("F64", &[], &2.0_f64.to_le_bytes()), alpha("I64", &[], &4_i64.to_le_bytes()), alpha("F16", &[1, 1], &[0, 0x3c])] {
        LoraFile::from_bytes("adapter", good).unwrap();
    }
}

#[test]
#[rustfmt::skip]
fn configurations_that_cannot_be_followed_are_refused() {
    let with = |config: &str| {
        let text = serde_json::to_string(config).unwrap();
        let entry = |name: &str, from: usize| format!(r#""{name}":{{"dtype":"F32","shape":[1,1],"data_offsets":[{from},{}]}}"#, from + 4);
        let (a, b) = (entry("unet.conv_in.lora_A.weight", 0), entry("unet.conv_in.lora_B.weight", 4));
        raw(&format!(r#"{{"__metadata__":{{"lora_adapter_metadata":{text}}},{a},{b}}}"#), &[0; 8])
    };
    assert_refused(&[
        ("no JSON", with("r = 1"), "metadata `lora_adapter_metadata`: expected value"),
        ("no rank", with(r#"{"unet.lora_alpha": 1}"#), "`unet`: missing field `r`"),
        ("other rank", with(r#"{"unet.r": 4, "unet.lora_alpha": 1}"#), "module `unet.conv_in`: has rank 1, and the file's metadata say 4"),
        ("alpha zero", with(r#"{"unet.r": 1, "unet.lora_alpha": 0}"#), "alpha is 0"),
        ("alpha of a pattern", with(r#"{"unet.r": 1, "unet.lora_alpha": 1, "unet.alpha_pattern": {"conv_in": 0}}"#), "alpha is 0"),
        ("regular expression", with(r#"{"unet.r": 1, "unet.lora_alpha": 1, "unet.rank_pattern": {".*in": 1}}"#), "pattern `.*in` is a regular expression"),
        ("changed base", with(r#"{"unet.r": 1, "unet.lora_alpha": 1, "unet.init_lora_weights": "pissa_niter_4"}"#), "training began with `pissa_niter_4`, which changes the base model too"),
        ("PEFT's own file", ones(&[("base_model.model.conv_in.lora_A.weight", &[1, 4]), ("base_model.model.conv_in.lora_B.weight", &[4, 1])]), "whose alphas are in an `adapter_config.json`"),
        ("transposed", with(r#"{"unet.r": 1, "unet.lora_alpha": 1, "unet.fan_in_fan_out": true}"#), "`fan_in_fan_out`"),
    ]);
    LoraFile::from_bytes("adapter", with(r#"{"unet.r": 1, "unet.lora_alpha": 2, "unet.init_lora_weights": true}"#)).unwrap();
}

#[test]
fn broken_files_are_refused_and_cut_ones_everywhere() {
    let overlapping = r#"{"unet.a.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"unet.a.lora_B.weight":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#;
    let huge = r#"{"unet.a.lora_A.weight":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#;
    assert_refused(&[
        (
            "overlap",
            raw(overlapping, &[0; 6]),
            "its data overlaps the data of tensor",
        ),
        (
            "shape overflow",
            raw(huge, &[0; 4]),
            "is not a whole number of bytes that a file can hold",
        ),
    ]);
    let whole = ones(&[
        ("lora_unet_conv_in.lora_down.weight", &[1, 4]),
        ("lora_unet_conv_in.lora_up.weight", &[4, 1]),
    ]);
    LoraFile::from_bytes("adapter", whole.clone()).unwrap();
    for cut in 8..whole.len() {
        assert!(
            reason(whole[..cut].to_vec()).contains("truncated"),
            "cut at {cut}"
        );
    }
    let missing = LoraFile::open(&ModelFile::from("no/such/file.safetensors"));
    assert!(matches!(missing, Err(Error::Missing { .. })));
}
