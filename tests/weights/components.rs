//! The components of a whole model in one file: diffusers' names, shapes and values, in place where they can be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::safetensors_file::{Tensor, f32_bytes, raw, well_formed};
use half::f16;
use tempfile::TempDir;
use tronie::Error;
use tronie::weights::{ExpansionCache, Weights};

const TEXT: &str = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight";
const PROJECTION: &str = "conditioner.embedders.1.model.text_projection";
const QUERY: &str = "first_stage_model.decoder.mid.attn_1.q.weight";
const CONV: &str = "model.diffusion_model.input_blocks.0.0.weight";
const EMA: &str = "model_ema.diffusion_modelinput_blocks00weight";

fn counted(count: usize, of: fn(f32) -> Vec<u8>) -> Vec<u8> {
    (0..count).flat_map(|i| of(i as f32)).collect()
}

fn single(value: f32) -> Vec<u8> {
    value.to_le_bytes().into()
}

fn half(value: f32) -> Vec<u8> {
    f16::from_f32(value).to_le_bytes().into()
}

fn upper(value: f32) -> Vec<u8> {
    value.to_le_bytes()[2..].into()
}

/// A file in which every way of looking at a tensor occurs.
fn model(dtype: &str, of: fn(f32) -> Vec<u8>) -> Vec<u8> {
    let tensors: [(&str, &[usize]); 5] = [
        (TEXT, &[6, 2]),
        (PROJECTION, &[2, 3]),
        (QUERY, &[2, 2, 1, 1]),
        (CONV, &[2, 1, 1, 1]),
        (EMA, &[2, 1, 1, 1]),
    ];
    let bytes = tensors.map(|(_, shape)| counted(shape.iter().product(), of));
    let tensors = tensors.iter().zip(&bytes);
    let tensors: Vec<Tensor<'_>> = tensors
        .map(|((name, shape), bytes)| (*name, dtype, *shape, bytes.as_slice()))
        .collect();
    well_formed(&tensors, 0)
}

fn saved(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn components(bytes: &[u8]) -> Result<BTreeMap<&'static str, Weights>, Error> {
    let folder = TempDir::new().unwrap();
    Weights::open(&[saved(folder.path(), bytes)])?.components()
}

fn reason(result: Result<impl std::fmt::Debug, Error>) -> String {
    match result {
        Err(Error::Weights { reason, .. }) => reason,
        other => panic!("an error about weights was expected, not {other:?}"),
    }
}

/// Component, name, shape, values, whether they lie in the file.
type Seen = (
    &'static str,
    &'static str,
    &'static [usize],
    &'static [f32],
    bool,
);

/// Every tensor of [`model`] under diffusers' names.
const SEEN: &[Seen] = &[
    (
        "text_encoder_2",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        &[2, 2],
        &[0.0, 1.0, 2.0, 3.0],
        true,
    ),
    (
        "text_encoder_2",
        "text_model.encoder.layers.0.self_attn.v_proj.weight",
        &[2, 2],
        &[8.0, 9.0, 10.0, 11.0],
        true,
    ),
    (
        "text_encoder_2",
        "text_projection.weight",
        &[3, 2],
        &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0],
        false,
    ),
    (
        "vae",
        "decoder.mid_block.attentions.0.to_q.weight",
        &[2, 2],
        &[0.0, 1.0, 2.0, 3.0],
        true,
    ),
    ("unet", "conv_in.weight", &[2, 1, 1, 1], &[0.0, 1.0], true),
];

#[test]
fn every_tensor_is_seen_as_in_diffusers_and_lies_in_the_file() {
    for (dtype, of) in [
        ("F32", single as fn(f32) -> Vec<u8>),
        ("F16", half),
        ("BF16", upper),
    ] {
        let components = components(&model(dtype, of)).unwrap();
        let keys: Vec<_> = components.keys().copied().collect();
        assert_eq!(keys, ["text_encoder_2", "unet", "vae"]);
        for (key, name, shape, values, is_mapped) in SEEN {
            let weights = &components[key];
            assert_eq!(weights.shape(name), Some(*shape));
            let wide = weights.tensor_f32(name, shape).unwrap();
            assert_eq!((wide.shape(), wide.as_slice()), (*shape, *values), "{name}");
            assert_eq!(wide.is_mapped(), *is_mapped && dtype == "F32", "{name}");
            let narrow = weights.tensor_f16(name, shape).unwrap();
            let halves: Vec<_> = values.iter().map(|v| f16::from_f32(*v)).collect();
            assert_eq!(narrow.as_slice(), halves, "{name}");
            assert_eq!(narrow.is_mapped(), *is_mapped && dtype == "F16", "{name}");
        }
    }
}

#[test]
fn one_expansion_serves_all_components_and_holds_nothing_else() {
    let folder = TempDir::new().unwrap();
    let file = saved(folder.path(), &model("F16", half));
    let cache = ExpansionCache::at(folder.path().join("cache")).with_smallest(1);
    for (key, name, shape, values, is_mapped) in SEEN {
        let whole = Weights::open(std::slice::from_ref(&file)).unwrap();
        let mut weights = whole.components().unwrap().remove(key).unwrap();
        cache
            .expand(&mut weights, [*name], &mut |_| Ok(()))
            .unwrap();
        let wide = weights.tensor_f32(name, shape).unwrap();
        assert_eq!((wide.shape(), wide.as_slice()), (*shape, *values), "{name}");
        assert_eq!(wide.is_mapped(), *is_mapped, "{name}");
    }
    let [entry] = &cache.entries().unwrap()[..] else {
        panic!("not one expansion");
    };
    let made = Weights::open(std::slice::from_ref(&entry.file)).unwrap();
    let mut wanted = [TEXT, PROJECTION, QUERY, CONV];
    wanted.sort_unstable();
    assert_eq!(made.names().collect::<Vec<_>>(), wanted);
}

#[test]
fn errors_name_the_tensor_of_the_file_too() {
    let components = components(&model("F32", single)).unwrap();
    assert_eq!(
        reason(components["unet"].tensor_f32("conv_in.weight", &[2, 4, 1, 1])),
        format!(
            "tensor `conv_in.weight` (`{CONV}` in the file): shape [2, 4, 1, 1] expected, [2, 1, 1, 1] found"
        )
    );
    let text = &components["text_encoder_2"];
    let absent = reason(text.tensor_f32("text_projection.bias", &[3]));
    let near = format!("`text_projection.weight` (`{PROJECTION}` in the file)");
    assert!(absent.contains(&near), "{absent}");
    let bytes = reason(text.get("text_projection.weight"));
    assert!(bytes.contains("other way round"), "{bytes}");
}

#[test]
fn what_cannot_be_seen_so_is_refused() {
    for (name, shape, what) in [
        (TEXT, &[4_usize, 1][..], "cannot be cut into 3 equal parts"),
        (TEXT, &[], "cannot be cut into 3 equal parts"),
        (QUERY, &[2, 1, 2, 1], "is not that of a 1x1 convolution"),
        (PROJECTION, &[4], "is not that of a matrix"),
    ] {
        let zero = f32_bytes(&vec![0.0; shape.iter().product()]);
        let found = reason(components(&well_formed(&[(name, "F32", shape, &zero)], 0)));
        assert_eq!(found, format!("tensor `{name}`: shape {shape:?} {what}"));
    }
    let other = components(&well_formed(&[("conv_in.weight", "F32", &[1], &[0; 4])], 0));
    assert!(other.unwrap().is_empty());
}

#[test]
fn a_text_encoder_has_the_names_that_its_graph_has() {
    let name = "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias";
    let file = well_formed(&[(name, "F32", &[1], &f32_bytes(&[2.5]))], 0);
    let weights = components(&file).unwrap().remove("text_encoder").unwrap();
    for needed in ["text_model.final_layer_norm.bias", "final_layer_norm.bias"] {
        let named = weights.clone().named_as([needed]);
        assert_eq!(named.tensor_f32(needed, &[1]).unwrap().as_slice(), [2.5]);
        assert_eq!(named.names().count(), 1);
    }
}

#[test]
fn a_headers_metadata_are_told() {
    let folder = TempDir::new().unwrap();
    let file = saved(folder.path(), &raw(r#"{"__metadata__":{"a":"b"}}"#, &[]));
    let weights = Weights::open(&[file]).unwrap();
    assert_eq!(weights.metadata()["a"], "b");
}
