//! What image encoders see in pictures, and what adapters make of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayD, Axis};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::image::{clip_pixels, read_picture};
use crate::memory::MemoryMode;
use crate::plan::names;
use crate::progress::{Observer, Stage};
use crate::request::Crop;
use crate::runtime::Session;
use crate::tensor::{Tensor, TensorMap, all_finite};

/// What an encoder looks at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sight {
    /// A picture in a file, made square, or what was seen in one.
    File(PathBuf, Crop),
    /// The unconditional picture: zeros in place of pixels, and of the pooled embedding.
    Nothing,
}

/// What an encoder sees in one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEmbedding {
    /// Pooled and projected `[1, width]`.
    pub image_embeds: ArrayD<f32>,
    /// Before the last layer `[1, tokens, width]`.
    pub hidden_states: ArrayD<f32>,
    /// The encoder's hidden states of the unconditional picture, where they were kept beside these.
    pub unconditional_hidden_states: Option<ArrayD<f32>>,
}

impl Pipeline {
    /// What the image encoder of an adapter sees in a picture, with what it sees in the unconditional one, and the
    /// encoder's name.
    ///
    /// # Errors
    /// [`Error::Request`] for adapters that the model does not have or that see no pictures; those of
    /// [`read_picture`] and of loading and running the encoder.
    pub fn embed_image(
        &self,
        (model, adapter): (&str, &str),
        (picture, crop): (&Path, Crop),
        memory: MemoryMode,
        observer: &mut Observer<'_>,
    ) -> Result<(ImageEmbedding, String)> {
        let facts = self.catalogue().model("model", model)?.adapter(adapter)?;
        let encoder = facts.encoder(adapter)?;
        let sight = Sight::File(picture.to_owned(), crop);
        let sights = [sight.clone(), Sight::Nothing].into();
        let mut seen = self.look((memory, model, encoder), sights, observer)?;
        let both = (seen.remove(&sight), seen.remove(&Sight::Nothing));
        let (Some(mut seen), Some(nothing)) = both else {
            return Err(missing(encoder, names::HIDDEN_STATES));
        };
        seen.unconditional_hidden_states = Some(nothing.hidden_states);
        Ok((seen, encoder.to_owned()))
    }

    /// Runs an image encoder of a model over pictures; it is not loaded when all of them were seen before.
    pub(super) fn look(
        &self,
        (memory, name, encoder): (MemoryMode, &str, &str),
        sights: BTreeSet<Sight>,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<Sight, ImageEmbedding>> {
        let rule = self
            .catalogue()
            .model("model", name)?
            .image_encoder(encoder)?;
        let mut seen = BTreeMap::new();
        let mut nothing = None;
        // Pictures are read before a network is loaded: a bad one fails at once.
        let mut pixels = Vec::new();
        for sight in sights {
            let picture = match &sight {
                Sight::File(path, _) if ImageEmbedding::is_file(path) => {
                    let saved = ImageEmbedding::load(path, encoder)?;
                    nothing = nothing.or_else(|| saved.unconditional());
                    seen.insert(sight, saved);
                    continue;
                }
                Sight::File(path, crop) => clip_pixels(&read_picture(path)?, rule, *crop),
                Sight::Nothing => Array3::zeros((3, rule.size, rule.size)),
            };
            pixels.push((sight, picture));
        }
        if let Some(nothing) = nothing {
            let looked_at = pixels.len();
            pixels.retain(|(sight, _)| *sight != Sight::Nothing);
            if pixels.len() != looked_at {
                seen.insert(Sight::Nothing, nothing);
            }
        }
        if pixels.is_empty() {
            return Ok(seen);
        }
        let mut network = self.network(name, encoder, &memory.into(), observer)?;
        self.begin_stage(observer, Stage::Image, encoder)?;
        for (sight, pixels) in pixels {
            let mut embedding = ImageEmbedding::of(&mut network.session, encoder, pixels)?;
            if sight == Sight::Nothing {
                // The reference takes zeros here, not what the encoder sees in zeros.
                embedding.image_embeds.fill(0.0);
            }
            seen.insert(sight, embedding);
        }
        self.give_back(network);
        Ok(seen)
    }
}

impl ImageEmbedding {
    fn of(session: &mut Session, encoder: &str, pixels: Array3<f32>) -> Result<Self> {
        let pixels = Tensor::from(pixels.insert_axis(Axis(0)));
        let mut outputs = session.run(&[(names::PIXEL_VALUES, &pixels)])?;
        Ok(Self {
            image_embeds: finite(&mut outputs, encoder, names::IMAGE_EMBEDS)?,
            hidden_states: finite(&mut outputs, encoder, names::HIDDEN_STATES)?,
            unconditional_hidden_states: None,
        })
    }

    /// What the encoder sees in the unconditional picture, where a file tells it.
    fn unconditional(&self) -> Option<Self> {
        let hidden_states = self.unconditional_hidden_states.clone()?;
        Some(Self {
            image_embeds: ArrayD::zeros(self.image_embeds.raw_dim()),
            hidden_states,
            unconditional_hidden_states: None,
        })
    }
}

/// An f32 output of a network, checked for overflow.
pub(super) fn finite(outputs: &mut TensorMap, component: &str, name: &str) -> Result<ArrayD<f32>> {
    match outputs.remove(name) {
        Some(Tensor::F32(array)) if all_finite(&array) => Ok(array),
        Some(Tensor::F32(_)) => Err(Error::NonFinite {
            component: component.to_owned(),
            step: None,
            remedy: "check its weights",
        }),
        _ => Err(missing(component, name)),
    }
}

pub(super) fn missing(component: &str, name: &str) -> Error {
    Error::Contract {
        graph: component.to_owned(),
        tensor: name.to_owned(),
        expected: "an f32 tensor of this name".into(),
        actual: "none".into(),
    }
}
