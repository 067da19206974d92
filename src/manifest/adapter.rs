//! Image prompts in the catalogue: adapters, the encoders that see pictures for them, and where a UNet listens to them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{Attention, Model, UnetFacts};
use crate::error::{Error, Result};

/// Most pixels along the side of the square that an image encoder sees; CLIP's is 224.
const MAX_PIXELS: usize = 4096;

/// A network that turns pictures into tokens for cross-attention.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Which family of adapters it is of.
    pub kind: AdapterKind,
    /// How it is built.
    pub form: AdapterForm,
    /// Hub id or folder it was exported from.
    pub origin: String,
    /// The encoder that sees its pictures, a key into [`Model::image_encoders`]; none where it reads identities alone.
    #[serde(default)]
    pub image_encoder: Option<String>,
    /// Width of the identities of faces that it reads, 512 of `ArcFace`; none where it reads pictures alone.
    #[serde(default)]
    pub identity: Option<usize>,
    /// Tokens that it makes of one picture or identity.
    pub tokens: usize,
}

/// Families of adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterKind {
    /// IP-Adapter: a second cross-attention in every layer, its result added to the text's.
    IpAdapter,
}

/// How an IP-Adapter is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterForm {
    /// The pooled embedding through one linear layer.
    Base,
    /// The hidden states through a resampler.
    Plus,
    /// The hidden states through a feed-forward network, one token for each.
    Full,
    /// A face's identity.
    Faceid,
    /// A face's identity and the hidden states of its picture.
    FaceidPlusv2,
}

impl Adapter {
    /// The encoder that sees its pictures, a key into [`Model::image_encoders`]; `name` is the adapter's own.
    ///
    /// # Errors
    /// [`Error::Request`] for adapters that read the identities of faces alone.
    pub fn encoder(&self, name: &str) -> Result<&str> {
        self.image_encoder.as_deref().ok_or_else(|| {
            let reason = format!("`{name}` reads the identities of faces and sees no pictures");
            Error::request("adapter", reason)
        })
    }
}

impl AdapterForm {
    /// The form's name in the catalogue.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Plus => "plus",
            Self::Full => "full",
            Self::Faceid => "faceid",
            Self::FaceidPlusv2 => "faceid-plusv2",
        }
    }

    /// Whether it reads a face's identity.
    pub const fn reads_identities(self) -> bool {
        matches!(self, Self::Faceid | Self::FaceidPlusv2)
    }

    /// Whether it reads what an image encoder sees.
    pub const fn sees_pictures(self) -> bool {
        !matches!(self, Self::Faceid)
    }
}

/// A side of a UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// On the way down.
    Down,
    /// At the bottom.
    Mid,
    /// On the way up.
    Up,
}

/// What an image encoder wants of a picture.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PixelRule {
    /// Side of the square that it sees, px.
    pub size: usize,
    /// Taken from each of red, green and blue, which are `0.0..=1.0`.
    pub mean: [f64; 3],
    /// What the difference is divided by.
    pub std: [f64; 3],
}

impl Model {
    /// The adapter called `name`.
    ///
    /// # Errors
    /// [`Error::Request`] that lists the model's adapters, or says how to add one.
    pub fn adapter(&self, name: &str) -> Result<&Adapter> {
        self.adapters.get(name).ok_or_else(|| {
            let known = self.adapters.keys().map(String::as_str).collect::<Vec<_>>();
            let reason = if known.is_empty() {
                format!(
                    "no adapter `{name}`: the model has none; add one with `python -m export adapter`"
                )
            } else {
                format!("no adapter `{name}`; the model has: {}", known.join(", "))
            };
            Error::request("image-prompt", reason)
        })
    }

    /// What the image encoder called `name` wants of a picture.
    ///
    /// # Errors
    /// [`Error::Request`] that lists the model's image encoders.
    pub fn image_encoder(&self, name: &str) -> Result<&PixelRule> {
        self.image_encoders.get(name).ok_or_else(|| {
            let known = self.image_encoders.keys().map(String::as_str);
            let known = match known.collect::<Vec<_>>() {
                known if known.is_empty() => "none".to_owned(),
                known => known.join(", "),
            };
            let reason = format!("no image encoder `{name}`; the model has: {known}");
            Error::request("image-encoder", reason)
        })
    }

    /// Checks adapters, image encoders and where the UNet has cross-attention.
    pub(super) fn check_adapters(&self) -> Result<(), String> {
        self.unet.check_attentions()?;
        for (name, rule) in &self.image_encoders {
            if !self.graphs.contains_key(name) {
                return Err(format!("image_encoders.{name}: no graph `{name}`"));
            }
            rule.check()
                .map_err(|reason| format!("image_encoders.{name}.{reason}"))?;
        }
        if let Some(name) = self.adapters.keys().next() {
            if !self.graphs.contains_key("unet_image") {
                return Err(format!(
                    "adapters.{name}: graph `unet_image` is missing; export the model again"
                ));
            }
            if self.unet.attentions.is_empty() {
                return Err(format!(
                    "adapters.{name}: unet.attentions is missing; export the model again"
                ));
            }
        }
        for (name, adapter) in &self.adapters {
            self.check_adapter(name, adapter)
                .map_err(|reason| format!("adapters.{name}: {reason}"))?;
        }
        Ok(())
    }

    fn check_adapter(&self, name: &str, adapter: &Adapter) -> Result<(), String> {
        if name.is_empty() || name.contains(['=', '@']) {
            return Err("a name must not be empty, nor have `=` or `@` in it".into());
        }
        for graph in [format!("{name}.projection"), format!("{name}.kv")] {
            if !self.graphs.contains_key(&graph) {
                return Err(format!(
                    "graph `{graph}` is missing; export the adapter again"
                ));
            }
        }
        if adapter.tokens == 0 {
            return Err("tokens must not be 0".into());
        }
        let form = adapter.form;
        match adapter.identity {
            None if form.reads_identities() => {
                return Err("identity is missing; export the adapter again".into());
            }
            Some(_) if !form.reads_identities() => {
                return Err(format!("the form {} has no identity", form.name()));
            }
            Some(0) => return Err("identity must not be 0".into()),
            _ => {}
        }
        match &adapter.image_encoder {
            None if !form.sees_pictures() => Ok(()),
            None => Err("image_encoder is missing; only the form faceid has none".into()),
            Some(_) if !form.sees_pictures() => Err("the form faceid has no image_encoder".into()),
            Some(encoder) if self.image_encoders.contains_key(encoder) => Ok(()),
            Some(encoder) => Err(format!("no `{encoder}` under image_encoders")),
        }
    }
}

impl PixelRule {
    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_PIXELS).contains(&self.size) {
            return Err(format!("size: must be 1 to {MAX_PIXELS}"));
        }
        if self.mean.iter().any(|mean| !mean.is_finite()) {
            return Err("mean: must be finite numbers".into());
        }
        if self.std.iter().any(|std| !std.is_finite() || *std <= 0.0) {
            return Err("std: must be finite numbers above 0".into());
        }
        Ok(())
    }
}

impl UnetFacts {
    /// Height and width of the levels with cross-attention by their downsampling factor, for latents of `height` and
    /// `width`.
    pub fn grids(&self, height: usize, width: usize) -> BTreeMap<usize, (usize, usize)> {
        // A convolution of stride 2 with a border of 1 rounds up.
        let grid = |factor: usize| (height.div_ceil(factor), width.div_ceil(factor));
        let factors = self.attentions.iter().map(|attention| attention.factor);
        factors.map(|factor| (factor, grid(factor))).collect()
    }

    fn check_attentions(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut layers = BTreeMap::new();
        for (at, attention) in self.attentions.iter().enumerate() {
            attention
                .check()
                .map_err(|reason| format!("unet.attentions[{at}]: {reason}"))?;
            if !names.insert(&attention.name) {
                return Err(format!(
                    "unet.attentions[{at}]: `{}` is listed twice",
                    attention.name
                ));
            }
            let of_width = layers.entry(attention.width).or_insert(0_usize);
            *of_width = of_width.saturating_add(attention.layers);
        }
        if !layers.is_empty() && layers != self.kv {
            return Err(format!(
                "unet.attentions: have layers {layers:?} by width, but unet.kv says {:?}",
                self.kv
            ));
        }
        Ok(())
    }
}

impl Attention {
    /// Where it lies, as diffusers' scales of blocks name it: the side of the UNet, the block there (0 in the middle) and
    /// the place in the block; `None` where the name is none of diffusers'.
    pub fn place(&self) -> Option<(Side, usize, usize)> {
        let (block, at) = self.name.rsplit_once(".attentions.")?;
        let at = at.parse().ok()?;
        if block == "mid_block" {
            return Some((Side::Mid, 0, at));
        }
        let (side, block) = block.split_once('.')?;
        let side = match side {
            "down_blocks" => Side::Down,
            "up_blocks" => Side::Up,
            _ => return None,
        };
        Some((side, block.parse().ok()?, at))
    }

    fn check(&self) -> Result<(), String> {
        if self.place().is_none() {
            return Err(format!(
                "`{}` is neither mid_block, down_blocks.N nor up_blocks.N, followed by .attentions.N",
                self.name
            ));
        }
        if self.layers == 0 || self.factor == 0 {
            return Err("layers and factor must not be 0".into());
        }
        Ok(())
    }
}
