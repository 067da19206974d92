//! What image encoders see in pictures, and what adapters make of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, ArrayD, Axis, Ix3};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::image::{clip_pixels, read_picture};
use crate::manifest::{Adapter, AdapterForm};
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
}

impl Pipeline {
    /// What the image encoder of an adapter sees in a picture, and the encoder's name.
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
        let mut seen = self.look((memory, model, encoder), [sight.clone()].into(), observer)?;
        let seen = seen
            .remove(&sight)
            .ok_or_else(|| missing(encoder, names::HIDDEN_STATES))?;
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
        // Pictures are read before a network is loaded: a bad one fails at once.
        let mut pixels = Vec::new();
        for sight in sights {
            let picture = match &sight {
                Sight::File(path, _) if ImageEmbedding::is_file(path) => {
                    let saved = ImageEmbedding::load(path, encoder)?;
                    seen.insert(sight, saved);
                    continue;
                }
                Sight::File(path, crop) => clip_pixels(&read_picture(path)?, rule, *crop),
                Sight::Nothing => Array3::zeros((3, rule.size, rule.size)),
            };
            pixels.push((sight, picture));
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
        })
    }

    /// The tokens `[tokens, context]` that an adapter's projection makes of it.
    pub(super) fn project(
        &self,
        session: &mut Session,
        component: &str,
        facts: &Adapter,
    ) -> Result<Array2<f32>> {
        let (name, seen) = match facts.form {
            AdapterForm::Base => (names::IMAGE_EMBEDS, &self.image_embeds),
            AdapterForm::Plus | AdapterForm::Full => (names::HIDDEN_STATES, &self.hidden_states),
            AdapterForm::Faceid | AdapterForm::FaceidPlusv2 => {
                return Err(missing(component, "id_embeds"));
            }
        };
        let mut outputs = session.run(&[(name, &Tensor::F32(seen.clone()))])?;
        let tokens = finite(&mut outputs, component, names::IP_HIDDEN_STATES)?;
        let fail = |actual: String| Error::Contract {
            graph: component.to_owned(),
            tensor: names::IP_HIDDEN_STATES.into(),
            expected: format!("[1, {}, context]", facts.tokens),
            actual,
        };
        let tokens = tokens
            .into_dimensionality::<Ix3>()
            .map_err(|e| fail(e.to_string()))?;
        if (tokens.dim().0, tokens.dim().1) != (1, facts.tokens) {
            return Err(fail(format!("{:?}", tokens.shape())));
        }
        Ok(tokens.index_axis_move(Axis(0), 0))
    }
}

/// An f32 output of a network, checked for overflow.
fn finite(outputs: &mut TensorMap, component: &str, name: &str) -> Result<ArrayD<f32>> {
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

fn missing(component: &str, name: &str) -> Error {
    Error::Contract {
        graph: component.to_owned(),
        tensor: name.to_owned(),
        expected: "an f32 tensor of this name".into(),
        actual: "none".into(),
    }
}
