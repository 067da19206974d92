//! Values that are written as text in JSON and on the command line alike.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::quoted;

/// Whether brackets in prompts mean something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptSyntax {
    /// Nothing: every letter is the prompt's, as in diffusers.
    #[default]
    Plain,
    /// Weights, breaks, schedules and turns, as in AUTOMATIC1111's web UI; see [`crate::prompt`].
    A1111,
}

/// What becomes of prompts that are longer than an encoder's sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LongPrompts {
    /// They are encoded in several sequences, which the UNet sees one after the other.
    #[default]
    Chunks,
    /// They are cut off, with a warning that names the words, as in diffusers.
    Cut,
}

/// One seed, or one a picture, written `1,2,3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeds(Vec<u64>);

impl Seeds {
    /// One seed a picture; `None` of none.
    pub fn each(seeds: Vec<u64>) -> Option<Self> {
        (!seeds.is_empty()).then_some(Self(seeds))
    }

    /// The seeds, at least one.
    pub fn all(&self) -> &[u64] {
        &self.0
    }
}

impl From<u64> for Seeds {
    fn from(seed: u64) -> Self {
        Self(vec![seed])
    }
}

/// Noise levels σ, above `low` up to `high`, written `LOW,HIGH`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The level below which it ends, exclusive.
    pub low: f64,
    /// The level at which it begins, inclusive.
    pub high: f64,
}

/// How the two halves of classifier-free guidance run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidanceRuns {
    /// Negative and positive in one batch: one run of the UNet a step.
    #[default]
    Batch,
    /// One after the other: half the activation memory.
    Split,
}

/// Whether the VAE decodes in overlapping tiles: a word, or a tile's side in px.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VaeTiling {
    /// Above a size that would need several GiB at once.
    #[default]
    Auto,
    /// Whenever the picture is larger than one tile of the VAE's native size.
    On,
    /// Never.
    Off,
    /// Whenever the picture is larger than one tile with sides of this many px.
    Tile(usize),
}

/// A size in px, written `WIDTHxHEIGHT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Width, px.
    pub width: usize,
    /// Height, px.
    pub height: usize,
}

/// A corner in px, written `TOP,LEFT`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Corner {
    /// Distance from the top, px.
    pub top: usize,
    /// Distance from the left, px.
    pub left: usize,
}

/// Where a run stops early: a number of steps, or `handoff`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopAt {
    /// After this many steps.
    Step(usize),
    /// Where the refiner would take over.
    Handoff,
}

/// A share of the steps, from `start` up to `end`, exclusive, both `0.0..=1.0`; written `START,END`, in JSON a list.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f64; 2]", into = "[f64; 2]")]
pub struct Share {
    /// Where it begins.
    pub start: f64,
    /// Where it ends.
    pub end: f64,
}

/// How a picture becomes the square that an image encoder sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crop {
    /// Its centre; the ends of the longer side are lost, as in diffusers.
    #[default]
    Center,
    /// All of it, between bars of the mean colour: zeros to the network, as in the unconditional picture.
    Pad,
    /// All of it, squeezed.
    Stretch,
}

impl From<[f64; 2]> for Share {
    fn from([start, end]: [f64; 2]) -> Self {
        Self { start, end }
    }
}

impl From<Share> for [f64; 2] {
    fn from(share: Share) -> Self {
        [share.start, share.end]
    }
}

fn pair<T: FromStr>(text: &str, separator: char) -> Option<(T, T)> {
    let (a, b) = text.split_once(separator)?;
    Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
}

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (width, height) = pair(text, 'x')
            .ok_or_else(|| format!("`{text}` is not WIDTHxHEIGHT, e.g. 1024x768"))?;
        Ok(Self { width, height })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for Corner {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (top, left) =
            pair(text, ',').ok_or_else(|| format!("`{text}` is not TOP,LEFT, e.g. 0,0"))?;
        Ok(Self { top, left })
    }
}

impl fmt::Display for Corner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.top, self.left)
    }
}

impl FromStr for StopAt {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "handoff" {
            return Ok(Self::Handoff);
        }
        text.parse()
            .map(Self::Step)
            .map_err(|_| format!("`{text}` is neither a number of steps nor `handoff`"))
    }
}

impl fmt::Display for StopAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(step) => write!(f, "{step}"),
            Self::Handoff => f.write_str("handoff"),
        }
    }
}

impl FromStr for Interval {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (low, high) = pair(text, ',')
            .ok_or_else(|| format!("`{text}` is not LOW,HIGH, two noise levels, e.g. 0.3,5.4"))?;
        Ok(Self { low, high })
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.low, self.high)
    }
}

impl FromStr for Share {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let ends = pair(text, ',').filter(|(a, b): &(f64, f64)| a.is_finite() && b.is_finite());
        let (start, end) = ends.ok_or_else(|| {
            format!(
                "{} is not START,END, two shares of the steps, e.g. 0,0.5",
                quoted(text)
            )
        })?;
        Ok(Self { start, end })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.start, self.end)
    }
}

impl FromStr for Seeds {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let seeds = text.split(',').map(|seed| seed.trim().parse());
        let seeds = seeds.collect::<Result<_, _>>();
        seeds.map(Self).map_err(|_| {
            format!(
                "`{text}` is neither a seed nor seeds with commas, whole numbers from 0 to 2^64 - 1"
            )
        })
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seeds = self.all().iter().map(u64::to_string).collect::<Vec<_>>();
        f.write_str(&seeds.join(","))
    }
}

/// A number in JSON where it is one, and a list elsewhere.
impl serde::Serialize for Seeds {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.all() {
            [seed] => s.serialize_u64(*seed),
            seeds => s.collect_seq(seeds),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Seeds {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Form {
            One(u64),
            Each(Vec<u64>),
        }
        match Form::deserialize(d) {
            Ok(Form::One(seed)) => Ok(Self::from(seed)),
            Ok(Form::Each(seeds)) if !seeds.is_empty() => Ok(Self(seeds)),
            _ => Err(serde::de::Error::custom(
                "a seed is a whole number from 0 to 2^64 - 1, or a list of them, one a picture",
            )),
        }
    }
}

/// Types that are one of some words.
macro_rules! from_words {
    ($($type:ident: $first:literal => $one:ident $(, $word:literal => $variant:ident)+;)+) => {$(
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $first => Ok(Self::$one),
                    $($word => Ok(Self::$variant),)+
                    _ => {
                        let known = concat!($first $(, ", ", $word)+);
                        Err(format!("{} is not known; known: {known}", quoted(text)))
                    }
                }
            }
        }
    )+};
}

from_words! {
    PromptSyntax: "plain" => Plain, "a1111" => A1111;
    LongPrompts: "chunks" => Chunks, "cut" => Cut;
    GuidanceRuns: "batch" => Batch, "split" => Split;
    Crop: "center" => Center, "pad" => Pad, "stretch" => Stretch;
}

impl fmt::Display for Crop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Center => "center",
            Self::Pad => "pad",
            Self::Stretch => "stretch",
        })
    }
}

impl FromStr for VaeTiling {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => text.parse().map(Self::Tile).map_err(|_| {
                format!("`{text}` is not known; known: auto, on, off, or a tile's side in px")
            }),
        }
    }
}

impl fmt::Display for VaeTiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::On => f.write_str("on"),
            Self::Off => f.write_str("off"),
            Self::Tile(px) => write!(f, "{px}"),
        }
    }
}

macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(Size, Corner, Interval);

/// A value that is a number in JSON where it is one, and a word elsewhere.
macro_rules! serde_as_number_or_text {
    ($($type:ident::$number:ident),*) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                match self {
                    Self::$number(n) => s.serialize_u64(*n as u64),
                    word => s.collect_str(word),
                }
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = match serde_json::Value::deserialize(d)? {
                    serde_json::Value::String(text) => text,
                    number @ serde_json::Value::Number(_) => number.to_string(),
                    other => {
                        let reason = format!("{other} is neither a number nor a word");
                        return Err(serde::de::Error::custom(reason));
                    }
                };
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_number_or_text!(StopAt::Step, VaeTiling::Tile);
