//! How strongly a UNet listens to an image prompt: everywhere alike, or by block.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, quoted};
use crate::manifest::{Attention, Side};

/// How strongly each cross-attention listens to an image prompt. Negative numbers push away.
///
/// Twin: the argument of `set_ip_adapter_scale` of diffusers' pipelines, and the names of `InstantStyle`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ImageScale {
    /// Everywhere alike.
    Number(f64),
    /// In the layers that carry what is named, 1; 0 in the others.
    Named(NamedScale),
    /// By block; 0 in those that are not listed.
    Blocks(BlockScales),
    /// Everywhere alike, one for each masked picture.
    Each(Vec<f64>),
}

/// Layers of SDXL by what they carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum NamedScale {
    /// Colours, material, atmosphere: `up.block_0`, its second attention.
    #[serde(rename = "style")]
    Style,
    /// Arrangement: `down.block_2`, its second attention.
    #[serde(rename = "layout")]
    Layout,
    /// Both.
    #[serde(rename = "style+layout")]
    StyleLayout,
}

/// Scales by block.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockScales {
    /// Of the blocks on the way down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<SideScales>,
    /// Of the block at the bottom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mid: Option<Scales>,
    /// Of the blocks on the way up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up: Option<SideScales>,
}

/// Scales of one side of the UNet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "the scale of a side is a number, a list with one for each attention of its blocks, or an object with \
                 one of these for each block, such as {\"block_1\": 0.5}"
)]
pub enum SideScales {
    /// The same in each block.
    All(Scales),
    /// By block, `block_0`, `block_1`, …; 0 in those that are not listed.
    Blocks(BTreeMap<String, Scales>),
}

/// Scales of one block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "the scale of a block is a number, or a list with one for each of its attentions"
)]
pub enum Scales {
    /// The same in each attention.
    One(f64),
    /// One for each attention; a single one for all.
    Each(Vec<f64>),
}

impl Default for ImageScale {
    fn default() -> Self {
        Self::Number(1.0)
    }
}

impl NamedScale {
    /// Names in diffusers of the modules that carry it.
    const fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Style => &["up_blocks.0.attentions.1"],
            Self::Layout => &["down_blocks.2.attentions.1"],
            Self::StyleLayout => &["up_blocks.0.attentions.1", "down_blocks.2.attentions.1"],
        }
    }
}

impl fmt::Display for NamedScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Style => "style",
            Self::Layout => "layout",
            Self::StyleLayout => "style+layout",
        })
    }
}

impl FromStr for ImageScale {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "style" => return Ok(Self::Named(NamedScale::Style)),
            "layout" => return Ok(Self::Named(NamedScale::Layout)),
            "style+layout" => return Ok(Self::Named(NamedScale::StyleLayout)),
            _ => {}
        }
        if text.starts_with('{') {
            return serde_json::from_str(text)
                .map(Self::Blocks)
                .map_err(|e| format!("{} is no scale of blocks: {e}", quoted(text)));
        }
        let number = |text: &str| text.parse().ok().filter(|n: &f64| n.is_finite());
        let numbers = text.split(',').map(number).collect::<Option<Vec<_>>>();
        numbers.map(Self::of).ok_or_else(|| {
            format!(
                "{} is no scale: a finite number, one for each masked picture (0.7,0.3), style, layout, style+layout, or \
                 scales of blocks in JSON, such as {{\"up\": {{\"block_0\": [0, 1, 0]}}}}",
                quoted(text)
            )
        })
    }
}

impl fmt::Display for ImageScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Named(name) => write!(f, "{name}"),
            Self::Each(numbers) => {
                let numbers = numbers.iter().map(f64::to_string).collect::<Vec<_>>();
                f.write_str(&numbers.join(","))
            }
            Self::Blocks(blocks) => {
                f.write_str(&serde_json::to_string(blocks).map_err(|_| fmt::Error)?)
            }
        }
    }
}

impl<'de> Deserialize<'de> for ImageScale {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        // An untagged enum would not say what is wrong inside a block.
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(text) => text.parse().map_err(D::Error::custom),
            blocks @ serde_json::Value::Object(_) => serde_json::from_value(blocks)
                .map(Self::Blocks)
                .map_err(D::Error::custom),
            other => {
                let numbers = match other {
                    list @ serde_json::Value::Array(_) => serde_json::from_value(list),
                    other => serde_json::from_value(other).map(|number| vec![number]),
                };
                numbers
                    .ok()
                    .filter(|numbers| !numbers.is_empty())
                    .map(Self::of)
                    .ok_or_else(|| {
                        let known = "a number, a list of one for each masked picture, a name or an object of blocks";
                        D::Error::custom(format!("a scale is {known}"))
                    })
            }
        }
    }
}

impl ImageScale {
    /// A single number is one for all pictures.
    fn of(numbers: Vec<f64>) -> Self {
        match numbers[..] {
            [number] => Self::Number(number),
            _ => Self::Each(numbers),
        }
    }

    /// The scale of each of a UNet's `attentions`, in their order, for a masked picture by its place; all layers of one
    /// have the same.
    ///
    /// Twin: `_maybe_expand_lora_scales` of diffusers with `default_scale=0.0`. Names of blocks that the UNet does not have
    /// are refused here and ignored there.
    ///
    /// # Errors
    /// [`Error::Request`] for a number that is not finite in f32, a picture that a list has none for, a block or named
    /// layer that the UNet does not have, and a list that has neither one number nor one for each attention of its block.
    pub fn per_layer(&self, picture: usize, attentions: &[Attention]) -> Result<Vec<f64>> {
        let scales = match self {
            Self::Number(number) => Ok(vec![*number; attentions.len()]),
            Self::Each(numbers) => match numbers.get(picture) {
                Some(number) => Ok(vec![*number; attentions.len()]),
                None => Err(format!("{} scales for more pictures", numbers.len())),
            },
            Self::Named(name) => named(*name, attentions),
            Self::Blocks(blocks) => blocks.expanded(attentions),
        };
        let scales = scales.and_then(|scales| {
            // Networks compute in f32.
            let lost = scales.iter().find(|scale| !(**scale as f32).is_finite());
            lost.map_or(Ok(()), |lost| {
                Err(format!("scale {lost} is not a finite number in f32"))
            })?;
            Ok(scales)
        });
        scales.map_err(|reason| Error::request("image-prompt", reason))
    }
}

fn named(name: NamedScale, attentions: &[Attention]) -> Result<Vec<f64>, String> {
    let mut scales = vec![0.0; attentions.len()];
    for module in name.modules() {
        let at = attentions.iter().position(|a| a.name == *module);
        let at = at.ok_or_else(|| {
            let all = attentions.iter().map(|a| a.name.as_str());
            format!(
                "scale {name} means {module}, which this model's UNet does not have; it has: {}",
                all.collect::<Vec<_>>().join(", ")
            )
        })?;
        scales[at] = 1.0;
    }
    Ok(scales)
}

/// A block with cross-attention: its side and its number there.
type Block = (Side, usize);

/// The places of a UNet's attentions in their list, by block and in the order inside the block.
struct Blocks(BTreeMap<Block, Vec<usize>>);

impl Blocks {
    fn of(attentions: &[Attention]) -> Self {
        let places = attentions.iter().enumerate();
        let mut places = places
            .filter_map(|(place, attention)| Some((attention.place()?, place)))
            .collect::<Vec<_>>();
        places.sort_unstable();
        let mut blocks = BTreeMap::<Block, Vec<usize>>::new();
        for ((side, block, _), place) in places {
            blocks.entry((side, block)).or_default().push(place);
        }
        Self(blocks)
    }

    /// The blocks that `wanted` is true of, at least one.
    fn called(&self, name: &str, wanted: impl Fn(Block) -> bool) -> Result<Vec<Block>, String> {
        let found = self.0.keys().copied().filter(|block| wanted(*block));
        let found = found.collect::<Vec<_>>();
        if found.is_empty() {
            let all = self.0.keys().map(|block| label(*block)).collect::<Vec<_>>();
            return Err(format!(
                "scale of {}: the model's UNet has no such block with cross-attention; it has: {}",
                quoted(name),
                all.join(", ")
            ));
        }
        Ok(found)
    }
}

impl BlockScales {
    fn expanded(&self, attentions: &[Attention]) -> Result<Vec<f64>, String> {
        let known = Blocks::of(attentions);
        let mut expanded = vec![0.0; attentions.len()];
        for (block, given) in self.listed(&known)? {
            let places = &known.0[&block];
            let each = given
                .each(places.len())
                .map_err(|reason| format!("scale of {}: {reason}", label(block)))?;
            for (place, scale) in places.iter().zip(each) {
                expanded[*place] = scale;
            }
        }
        Ok(expanded)
    }

    /// The blocks that have scales.
    fn listed(&self, known: &Blocks) -> Result<Vec<(Block, &Scales)>, String> {
        let mut listed = Vec::new();
        let mut add = |blocks: Vec<Block>, given| {
            listed.extend(blocks.into_iter().map(|block| (block, given)));
        };
        if let Some(given) = &self.mid {
            add(known.called("mid", |(side, _)| side == Side::Mid)?, given);
        }
        for (side, name, given) in [(Side::Down, "down", &self.down), (Side::Up, "up", &self.up)] {
            match given {
                None => {}
                Some(SideScales::All(given)) => {
                    add(known.called(name, |block| block.0 == side)?, given);
                }
                Some(SideScales::Blocks(blocks)) => {
                    for (block, given) in blocks {
                        let name = format!("{name}.{block}");
                        add(known.called(&name, |block| label(block) == name)?, given);
                    }
                }
            }
        }
        Ok(listed)
    }
}

impl Scales {
    /// One for each of `count` attentions.
    fn each(&self, count: usize) -> Result<Vec<f64>, String> {
        match self {
            Self::One(scale) => Ok(vec![*scale; count]),
            Self::Each(scales) if scales.len() == 1 => Ok(vec![scales[0]; count]),
            Self::Each(scales) if scales.len() == count => Ok(scales.clone()),
            Self::Each(scales) => Err(format!(
                "has {} numbers; give one, or {count}, one for each of its attentions",
                scales.len()
            )),
        }
    }
}

/// A block's name in scales: `down.block_1`, `mid`.
fn label((side, block): Block) -> String {
    match side {
        Side::Down => format!("down.block_{block}"),
        Side::Mid => "mid".into(),
        Side::Up => format!("up.block_{block}"),
    }
}
