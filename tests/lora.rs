//! LoRA files in every form, applied to a model's weights.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/safetensors_file.rs"]
mod safetensors_file;

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors_file::{f32_bytes, well_formed};
use tronie::lora::{LoraFile, change};
use tronie::weights::Weights;

/// Tensors of f32 values.
type Tensors<'a> = &'a [(&'a str, &'a [usize], &'a [f32])];

fn file(tensors: Tensors<'_>) -> Vec<u8> {
    let bytes: Vec<_> = tensors.iter().map(|(.., v)| f32_bytes(v)).collect();
    let entries = tensors.iter().zip(&bytes);
    let entries: Vec<_> = entries
        .map(|((name, shape, _), bytes)| (*name, "F32", *shape, bytes.as_slice()))
        .collect();
    well_formed(&entries, 0)
}

#[test]
fn a_plain_lora_is_added_times_alpha_over_rank() {
    let name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    let mut unet = Weights::from_bytes("unet", file(&[(name, &[2, 3], &[0.5; 6])])).unwrap();
    let module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k";
    let [down, up, alpha] =
        ["lora_down.weight", "lora_up.weight", "alpha"].map(|ending| format!("{module}.{ending}"));
    let lora = LoraFile::from_bytes(
        "lora",
        file(&[
            (&down, &[2, 3], &[1.0, 2.0, 3.0, 0.0, 1.0, 0.0]),
            (&up, &[2, 2], &[1.0, 0.0, 0.0, 2.0]),
            (&alpha, &[], &[1.0]),
        ]),
    )
    .unwrap();
    let fit = lora.fit(&BTreeMap::from([("unet".to_owned(), &unet)]));
    assert_eq!(fit.unmatched, []);
    for matched in fit.matched {
        let tensor = matched.tensor.clone();
        unet.change(&tensor, change(Arc::new(matched), 2.0))
            .unwrap();
    }
    let merged = unet.tensor_f32(name, &[2, 3]).unwrap();
    assert_eq!(merged.as_slice(), [1.5, 2.5, 3.5, 0.5, 2.5, 0.5]);
}
