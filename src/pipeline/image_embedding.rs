//! What image encoders see in pictures, and what adapters make of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ndarray::{Array2, Array4, ArrayD, Axis, Ix3};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::image::{Crop, clip_pixels, read_picture};
use crate::manifest::{Adapter, AdapterForm};
use crate::plan::names;
use crate::progress::{Observer, Stage};
use crate::request::Resolved;
use crate::runtime::Session;
use crate::tensor::{Tensor, TensorMap, all_finite};

/// What an encoder looks at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sight {
    /// A picture in a file, made square.
    File(PathBuf, Crop),
    /// The unconditional picture: zeros in place of pixels, and of the pooled embedding.
    Nothing,
}

/// What an encoder sees in one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEmbedding {
    /// Pooled and projected `[1, width]`.
    pub image_embeds: Tensor,
    /// Before the last layer `[1, tokens, width]`.
    pub hidden_states: Tensor,
}

impl Pipeline {
    /// Runs an image encoder of a model over pictures.
    pub(super) fn look(
        &self,
        (request, name, encoder): (&Resolved, &str, &str),
        sights: BTreeSet<Sight>,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<Sight, ImageEmbedding>> {
        let rule = self.catalogue().model("model", name)?.image_encoder(encoder)?;
        // Pictures are read before a network is loaded: a bad one fails at once.
        let mut pixels = Vec::new();
        for sight in sights {
            let picture = match &sight {
                Sight::File(path, crop) => clip_pixels(&read_picture(path)?, rule, *crop),
                Sight::Nothing => Array4::zeros((1, 3, rule.size, rule.size)),
            };
            pixels.push((sight, picture));
        }
        let mut network = self.network(name, encoder, request.memory(), observer)?;
        self.begin_stage(observer, Stage::Image, encoder)?;
        let mut seen = BTreeMap::new();
        for (sight, pixels) in pixels {
            let mut embedding = ImageEmbedding::of(&mut network.session, encoder, pixels)?;
            if sight == Sight::Nothing
                && let Tensor::F32(pooled) = &mut embedding.image_embeds
            {
                // The reference takes zeros here, not what the encoder sees in zeros.
                pooled.fill(0.0);
            }
            seen.insert(sight, embedding);
        }
        self.give_back(network);
        Ok(seen)
    }
}

impl ImageEmbedding {
    fn of(session: &mut Session, encoder: &str, pixels: Array4<f32>) -> Result<Self> {
        let pixels = Tensor::from(pixels);
        let mut outputs = session.run(&[(names::PIXEL_VALUES, &pixels)])?;
        let mut take = |name: &str| finite(&mut outputs, encoder, name).map(Tensor::F32);
        Ok(Self {
            image_embeds: take(names::IMAGE_EMBEDS)?,
            hidden_states: take(names::HIDDEN_STATES)?,
        })
    }

    /// The tokens `[tokens, context]` that an adapter's projection makes of it.
    pub(super) fn project(
        &self,
        session: &mut Session,
        component: &str,
        facts: &Adapter,
    ) -> Result<Array2<f32>> {
        let feed = match facts.form {
            AdapterForm::Base => (names::IMAGE_EMBEDS, &self.image_embeds),
            AdapterForm::Plus | AdapterForm::Full => (names::HIDDEN_STATES, &self.hidden_states),
        };
        let mut outputs = session.run(&[feed])?;
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
        _ => Err(Error::Contract {
            graph: component.to_owned(),
            tensor: name.to_owned(),
            expected: "an f32 output of this name".into(),
            actual: "none in the graph".into(),
        }),
    }
}
