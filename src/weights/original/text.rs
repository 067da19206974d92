//! Text encoders in the original layout: CLIP under its names of transformers 4, `OpenCLIP` under its own, with q, k and v
//! in one tensor.
//!
//! Python twin: diffusers' `convert_ldm_clip_checkpoint` and `convert_open_clip_checkpoint`.

use super::super::view::View;
use super::replaced_back;

/// What modules outside the layers are called, in transformers and in `OpenCLIP`.
const OUTSIDE: &[(&str, &str)] = &[
    ("text_model.embeddings.token_embedding", "token_embedding"),
    (
        "text_model.embeddings.position_embedding.weight",
        "positional_embedding",
    ),
    ("text_model.final_layer_norm", "ln_final"),
];

/// What modules of a layer are called.
const LAYER: &[(&str, &str)] = &[
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];

/// The three projections in the order in which one tensor holds them.
const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// The views of a CLIP text encoder, whose names are transformers' already.
pub(super) fn clip(names: &[(&str, usize)]) -> Vec<View> {
    // Old versions of transformers saved the numbers of the positions too.
    let own = |name: &str| name.starts_with("text_model.") && !name.ends_with(".position_ids");
    let names = names.iter().filter(|(name, _)| own(name));
    names
        .map(|(name, _)| View::whole((*name).to_owned(), name))
        .collect()
}

/// The views of an `OpenCLIP` text encoder.
pub(super) fn open_clip(names: &[(&str, usize)]) -> Vec<View> {
    names
        .iter()
        .flat_map(|(name, _)| of_open_clip(name))
        .collect()
}

fn of_open_clip(name: &str) -> Vec<View> {
    if name == "text_projection" {
        // A factor from the right, `[width, projection]`, and a linear layer is one from the left.
        return vec![View::transposed("text_projection.weight".to_owned(), name)];
    }
    if let Some(diffusers) = replaced_back(OUTSIDE, name) {
        return vec![View::whole(diffusers, name)];
    }
    let layer = name.strip_prefix("transformer.resblocks.");
    let Some((layer, rest)) = layer.and_then(|rest| rest.split_once('.')) else {
        return Vec::new();
    };
    let layer = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let parts = FUSED.iter().enumerate();
        return parts
            .map(|(part, projection)| {
                let diffusers = format!("{layer}.self_attn.{projection}.{kind}");
                View::rows(diffusers, name, part, FUSED.len())
            })
            .collect();
    }
    let rest = replaced_back(LAYER, rest);
    rest.map(|rest| View::whole(format!("{layer}.{rest}"), name))
        .into_iter()
        .collect()
}
