//! A UNet's names in the original layout, which all-in-one checkpoints and kohya's `LoRA`s use.
//!
//! Python twin: diffusers' `convert_ldm_unet_checkpoint`.

use std::collections::{BTreeMap, BTreeSet};

use super::{number, replaced, replaced_back};

/// How a UNet's blocks are counted in the original layout: one list from the input to the middle, one from there on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnetNames {
    /// Resnets of a down block; an up block has one more.
    layers: usize,
    /// Up blocks that have attention, whose upsampler comes third and not second.
    attentive: BTreeSet<usize>,
}

/// What modules inside a resnet are called.
const RESNET: &[(&str, &str)] = &[
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// What modules outside the blocks are called.
const OUTSIDE: &[(&str, &str)] = &[
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

impl UnetNames {
    /// The counting of the UNet that has tensors (or modules) of these diffusers names.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut layers, mut attentive) = (0, BTreeSet::new());
        for name in names {
            let mut parts = name.split('.');
            let (part, block) = (parts.next(), number(parts.next()));
            match (part, block, parts.next(), number(parts.next())) {
                (Some("down_blocks"), Some(0), Some("resnets"), Some(layer)) => {
                    layers = layers.max(layer + 1);
                }
                (Some("up_blocks"), Some(block), Some("attentions"), _) => {
                    attentive.insert(block);
                }
                _ => {}
            }
        }
        Self { layers, attentive }
    }

    /// The counting of the UNet that has tensors of these original names, without `model.diffusion_model.`.
    pub fn of_original<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut sampler, mut last) = (None::<usize>, 0);
        let (mut attentive, mut outputs) = (BTreeSet::new(), BTreeSet::new());
        for name in names {
            let mut parts = name.split('.');
            let (list, place) = (parts.next(), number(parts.next()));
            match (list, place, parts.next(), parts.next()) {
                // The first downsampler follows the layers of the first block.
                (Some("input_blocks"), Some(place), Some("0"), Some("op")) => {
                    sampler = Some(sampler.map_or(place, |first| first.min(place)));
                }
                (Some("input_blocks"), Some(place), ..) => last = last.max(place),
                (Some("output_blocks"), Some(place), Some("1"), Some("norm")) => {
                    outputs.insert(place);
                }
                _ => {}
            }
        }
        let layers = sampler.map_or(last, |first| first.saturating_sub(1));
        attentive.extend(outputs.into_iter().map(|place| place / (layers + 1)));
        Self { layers, attentive }
    }

    /// The diffusers name of a tensor or module of the original name; `None` for one that no SDXL UNet has.
    pub fn diffusers(&self, original: &str) -> Option<String> {
        if let Some(name) = replaced_back(OUTSIDE, original) {
            return Some(name);
        }
        let mut parts = original.splitn(4, '.');
        let (list, place, kind) = (parts.next()?, number(parts.next())?, parts.next()?);
        let (block, layer) = match list {
            "middle_block" => {
                let rest = [Some(kind), parts.next()].into_iter().flatten();
                let rest = rest.collect::<Vec<_>>().join(".");
                return match place {
                    1 => Some(format!("mid_block.attentions.0.{rest}")),
                    0 | 2 => Some(format!(
                        "mid_block.resnets.{}.{}",
                        place / 2,
                        replaced_back(RESNET, &rest)?
                    )),
                    _ => None,
                };
            }
            "input_blocks" => {
                let place = place.checked_sub(1)?;
                ("down_blocks", place)
            }
            "output_blocks" => ("up_blocks", place),
            _ => return None,
        };
        let (at, layer) = (layer / (self.layers + 1), layer % (self.layers + 1));
        let rest = parts.next()?;
        match (
            block,
            kind,
            rest.strip_prefix("op"),
            rest.strip_prefix("conv"),
        ) {
            ("down_blocks", "0", Some(rest), _) if layer == self.layers => {
                Some(format!("{block}.{at}.downsamplers.0.conv{rest}"))
            }
            ("up_blocks", "1" | "2", _, Some(rest)) if layer == self.layers => {
                Some(format!("{block}.{at}.upsamplers.0.conv{rest}"))
            }
            (_, "0", ..) => {
                let rest = replaced_back(RESNET, rest)?;
                Some(format!("{block}.{at}.resnets.{layer}.{rest}"))
            }
            (_, "1", ..) => Some(format!("{block}.{at}.attentions.{layer}.{rest}")),
            _ => None,
        }
    }

    /// The original name of a tensor or module, without `model.diffusion_model.`; `None` for one that no SDXL UNet has.
    pub fn original(&self, diffusers: &str) -> Option<String> {
        if let Some(name) = replaced(OUTSIDE, diffusers) {
            return Some(name);
        }
        let mut parts = diffusers.splitn(5, '.');
        let part = parts.next()?;
        if part == "mid_block" {
            let (kind, index) = (parts.next()?, number(parts.next())?);
            let rest = parts.collect::<Vec<_>>().join(".");
            return match kind {
                "resnets" => Some(format!("middle_block.{}.{}", 2 * index, resnet(&rest)?)),
                "attentions" => Some(format!("middle_block.{}.{rest}", 2 * index + 1)),
                _ => None,
            };
        }
        let block = number(parts.next())?;
        let (kind, index, rest) = (parts.next()?, number(parts.next())?, parts.next()?);
        let (list, place, last) = match part {
            "down_blocks" => {
                let first = 1 + block * (self.layers + 1);
                ("input_blocks", first + index, first + self.layers)
            }
            "up_blocks" => {
                let first = block * (self.layers + 1);
                ("output_blocks", first + index, first + self.layers)
            }
            _ => return None,
        };
        match (kind, rest.strip_prefix("conv")) {
            ("resnets", _) => Some(format!("{list}.{place}.0.{}", resnet(rest)?)),
            ("attentions", _) => Some(format!("{list}.{place}.1.{rest}")),
            ("downsamplers", Some(rest)) => Some(format!("{list}.{last}.0.op{rest}")),
            ("upsamplers", Some(rest)) => {
                let third = 1 + usize::from(self.attentive.contains(&block));
                Some(format!("{list}.{last}.{third}.conv{rest}"))
            }
            _ => None,
        }
    }

    /// Every name by its original one.
    pub fn by_original<'a>(
        &self,
        diffusers: impl IntoIterator<Item = &'a str>,
    ) -> BTreeMap<String, &'a str> {
        let names = diffusers.into_iter();
        names
            .filter_map(|name| Some((self.original(name)?, name)))
            .collect()
    }
}

fn resnet(rest: &str) -> Option<String> {
    replaced(RESNET, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pairs of names out of the published SDXL base checkpoint.
    const SDXL: &[(&str, &str)] = &[
        ("conv_in.weight", "input_blocks.0.0.weight"),
        (
            "down_blocks.0.resnets.1.conv1.weight",
            "input_blocks.2.0.in_layers.2.weight",
        ),
        (
            "down_blocks.0.downsamplers.0.conv.bias",
            "input_blocks.3.0.op.bias",
        ),
        (
            "down_blocks.1.resnets.0.conv_shortcut.weight",
            "input_blocks.4.0.skip_connection.weight",
        ),
        (
            "down_blocks.1.attentions.1.proj_in.weight",
            "input_blocks.5.1.proj_in.weight",
        ),
        (
            "down_blocks.1.downsamplers.0.conv.weight",
            "input_blocks.6.0.op.weight",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0.bias",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.bias",
        ),
        (
            "mid_block.resnets.0.time_emb_proj.weight",
            "middle_block.0.emb_layers.1.weight",
        ),
        (
            "mid_block.attentions.0.norm.weight",
            "middle_block.1.norm.weight",
        ),
        (
            "mid_block.resnets.1.norm2.bias",
            "middle_block.2.out_layers.0.bias",
        ),
        (
            "up_blocks.0.resnets.2.conv2.weight",
            "output_blocks.2.0.out_layers.3.weight",
        ),
        (
            "up_blocks.0.attentions.2.norm.weight",
            "output_blocks.2.1.norm.weight",
        ),
        (
            "up_blocks.0.upsamplers.0.conv.weight",
            "output_blocks.2.2.conv.weight",
        ),
        (
            "up_blocks.1.attentions.0.norm.weight",
            "output_blocks.3.1.norm.weight",
        ),
        (
            "up_blocks.1.upsamplers.0.conv.weight",
            "output_blocks.5.2.conv.weight",
        ),
        (
            "up_blocks.2.resnets.2.norm1.weight",
            "output_blocks.8.0.in_layers.0.weight",
        ),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("conv_norm_out.weight", "out.0.weight"),
        ("conv_out.weight", "out.2.weight"),
    ];

    #[test]
    fn names_are_those_of_the_published_checkpoint() {
        let names = UnetNames::of(SDXL.iter().map(|(diffusers, _)| *diffusers));
        for (diffusers, original) in SDXL {
            assert_eq!(names.original(diffusers).as_deref(), Some(*original));
        }
        let names = UnetNames::of_original(SDXL.iter().map(|(_, original)| *original));
        for (diffusers, original) in SDXL {
            assert_eq!(names.diffusers(original).as_deref(), Some(*diffusers));
        }
    }

    #[test]
    fn an_upsampler_without_attention_comes_second() {
        let names = UnetNames::of([
            "down_blocks.0.resnets.1.norm1.weight",
            "up_blocks.1.attentions.0.norm.weight",
        ]);
        let original = |name| names.original(name);
        assert_eq!(
            original("up_blocks.0.upsamplers.0.conv.bias").as_deref(),
            Some("output_blocks.2.1.conv.bias")
        );
        assert_eq!(
            original("up_blocks.1.upsamplers.0.conv.bias").as_deref(),
            Some("output_blocks.5.2.conv.bias")
        );
    }

    #[test]
    fn other_names_have_no_original() {
        let names = UnetNames::of(["down_blocks.0.resnets.1.norm1.weight"]);
        for name in [
            "",
            "conv_input.weight",
            "down_blocks.x.resnets.0.conv1",
            "down_blocks.0.resnets.0.conv3",
            "a.b",
        ] {
            assert_eq!(names.original(name), None, "{name}");
        }
        for name in [
            "",
            "input_blocks.0.1.weight",
            "input_blocks.x.0.in_layers.0",
            "input_blocks.1.0.in_layers.7",
            "output_blocks.0.3.weight",
            "middle_block.3.norm",
            "label_emb.1",
            "a.b",
        ] {
            assert_eq!(names.diffusers(name), None, "{name}");
        }
    }
}
