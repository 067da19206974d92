//! A VAE's names in the original layout: the decoder's blocks are counted from the picture, attention is 1×1 convolutions.
//!
//! Python twin: diffusers' `convert_ldm_vae_checkpoint`.

use super::super::view::View;
use super::{number, replaced_back};

/// What modules outside the blocks are called, in diffusers and in the original.
const OUTSIDE: &[(&str, &str)] = &[
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
];

/// What modules of an encoder or decoder outside its blocks are called.
const SIDE: &[(&str, &str)] = &[
    ("conv_in", "conv_in"),
    ("conv_out", "conv_out"),
    ("conv_norm_out", "norm_out"),
];

/// What modules of the middle are called.
const MIDDLE: &[(&str, &str)] = &[
    ("resnets.0", "block_1"),
    ("resnets.1", "block_2"),
    ("attentions.0.group_norm", "attn_1.norm"),
    ("attentions.0.to_q", "attn_1.q"),
    ("attentions.0.to_k", "attn_1.k"),
    ("attentions.0.to_v", "attn_1.v"),
    ("attentions.0.to_out.0", "attn_1.proj_out"),
];

/// The views of a VAE whose tensors have these original names and numbers of dimensions.
pub(super) fn views(names: &[(&str, usize)]) -> Vec<View> {
    let blocks = names
        .iter()
        .filter_map(|(name, _)| {
            let rest = name.strip_prefix("decoder.up.")?;
            number(rest.split('.').next())
        })
        .max()
        .map_or(0, |last| last + 1);
    let views = names.iter().filter_map(|(name, rank)| {
        let diffusers = diffusers(name, blocks)?;
        let linear = *rank == 4 && diffusers.contains(".attentions.");
        Some(if linear {
            View::linear(diffusers, name)
        } else {
            View::whole(diffusers, name)
        })
    });
    views.collect()
}

/// The diffusers name of a tensor of a VAE whose decoder has `blocks` blocks.
fn diffusers(original: &str, blocks: usize) -> Option<String> {
    if let Some(name) = replaced_back(OUTSIDE, original) {
        return Some(name);
    }
    let (side, rest) = original.split_once('.')?;
    if !matches!(side, "encoder" | "decoder") {
        return None;
    }
    if let Some(name) = replaced_back(SIDE, rest) {
        return Some(format!("{side}.{name}"));
    }
    if let Some(rest) = rest.strip_prefix("mid.") {
        let name = shortcut(&replaced_back(MIDDLE, rest)?);
        return Some(format!("{side}.mid_block.{name}"));
    }
    let (list, rest) = rest.split_once('.')?;
    let (block, rest) = rest.split_once('.')?;
    let block = number(Some(block))?;
    let (list, block, sampler, samplers) = match (side, list) {
        ("encoder", "down") => ("down_blocks", block, "downsample.", "downsamplers.0."),
        ("decoder", "up") => {
            let block = blocks.checked_sub(1 + block)?;
            ("up_blocks", block, "upsample.", "upsamplers.0.")
        }
        _ => return None,
    };
    let rest = match (rest.strip_prefix("block."), rest.strip_prefix(sampler)) {
        (Some(rest), _) => format!("resnets.{}", shortcut(rest)),
        (_, Some(rest)) => format!("{samplers}{rest}"),
        _ => return None,
    };
    Some(format!("{side}.{list}.{block}.{rest}"))
}

fn shortcut(name: &str) -> String {
    name.replace(".nin_shortcut.", ".conv_shortcut.")
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_those_of_the_published_checkpoint() {
        for (diffusers, original) in [
            ("encoder.conv_in.weight", "encoder.conv_in.weight"),
            ("encoder.conv_norm_out.bias", "encoder.norm_out.bias"),
            (
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
                "encoder.down.1.block.0.nin_shortcut.weight",
            ),
            (
                "encoder.down_blocks.2.downsamplers.0.conv.bias",
                "encoder.down.2.downsample.conv.bias",
            ),
            (
                "decoder.up_blocks.0.resnets.2.norm1.weight",
                "decoder.up.3.block.2.norm1.weight",
            ),
            (
                "decoder.up_blocks.2.upsamplers.0.conv.weight",
                "decoder.up.1.upsample.conv.weight",
            ),
            (
                "decoder.mid_block.resnets.1.conv2.bias",
                "decoder.mid.block_2.conv2.bias",
            ),
            (
                "decoder.mid_block.attentions.0.to_out.0.weight",
                "decoder.mid.attn_1.proj_out.weight",
            ),
            ("post_quant_conv.bias", "post_quant_conv.bias"),
        ] {
            assert_eq!(super::diffusers(original, 4).as_deref(), Some(diffusers));
        }
        for name in [
            "",
            "loss.logvar",
            "decoder.up.4.block.0.norm1.bias",
            "encoder.up.0.block.0.norm1.bias",
        ] {
            assert_eq!(super::diffusers(name, 4), None, "{name}");
        }
    }
}
