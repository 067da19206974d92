//! What adapters make of what they are shown: tokens for cross-attention.
//!
//! Python twin: diffusers' `MultiIPAdapterImageProjection` and the projections in it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ndarray::{Array2, ArrayD, Axis, Ix3, IxDyn};

use super::identity::read_identity;
use super::image_embedding::{ImageEmbedding, Sight, finite, missing};
use crate::error::{Error, Result};
use crate::manifest::{Adapter, AdapterForm};
use crate::plan::names;
use crate::request::ImagePrompt;
use crate::runtime::Session;
use crate::tensor::Tensor;

/// What an adapter is shown as one picture: the parts that its form reads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shown {
    /// What its image encoder looks at; none where it reads identities alone.
    pub(super) sight: Option<Sight>,
    /// Whose face it is; none where it reads pictures alone.
    pub(super) identity: Option<Identity>,
}

/// Whose face it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Identity {
    /// That of a file.
    File(PathBuf),
    /// The unconditional one: zeros.
    Nobody,
}

/// Identities by who it is, `[1, width]`.
pub(super) type Identities = BTreeMap<Identity, ArrayD<f32>>;

impl Shown {
    /// What each picture of a prompt shows to an adapter of this form.
    pub(super) fn of(prompt: &ImagePrompt, form: AdapterForm) -> Vec<Self> {
        let places = 0..prompt.pictures.len();
        let shown = |at| {
            let (picture, face) = (prompt.pictures.get(at), prompt.faces.get(at));
            Self::one(prompt, form, picture, face)
        };
        places.map(shown).collect()
    }

    /// What a prompt shows to the negative branch.
    pub(super) fn negative(prompt: &ImagePrompt, form: AdapterForm) -> Self {
        let (picture, face) = (&prompt.negative, &prompt.negative_face);
        Self::one(prompt, form, picture.as_ref(), face.as_ref())
    }

    fn one(
        prompt: &ImagePrompt,
        form: AdapterForm,
        picture: Option<&PathBuf>,
        face: Option<&PathBuf>,
    ) -> Self {
        let crop = prompt.crop.unwrap_or_default();
        let seen = if form.reads_identities() {
            face
        } else {
            picture
        };
        let sight = seen.map_or(Sight::Nothing, |path| Sight::File(path.clone(), crop));
        let identity = picture.map_or(Identity::Nobody, |path| Identity::File(path.clone()));
        Self {
            sight: form.sees_pictures().then_some(sight),
            identity: form.reads_identities().then_some(identity),
        }
    }

    /// What the image encoder must look at: the pooled embedding of nothing is zeros without looking.
    pub(super) fn sight(&self, form: AdapterForm) -> Option<&Sight> {
        let pooled = form == AdapterForm::Base;
        let sight = self.sight.as_ref();
        sight.filter(|sight| !(pooled && **sight == Sight::Nothing))
    }
}

/// Reads the identities that an adapter is shown.
///
/// # Errors
/// Those of [`read_identity`].
pub(super) fn read_identities<'a>(
    shown: impl Iterator<Item = &'a Shown>,
    facts: &Adapter,
) -> Result<Identities> {
    let width = facts.identity.unwrap_or_default();
    let mut read = Identities::new();
    for identity in shown.filter_map(|shown| shown.identity.as_ref()) {
        if read.contains_key(identity) {
            continue;
        }
        let values = match identity {
            Identity::File(path) => read_identity(path, width)?,
            Identity::Nobody => ArrayD::zeros(IxDyn(&[1, width])),
        };
        read.insert(identity.clone(), values);
    }
    Ok(read)
}

/// An adapter's projection, and what it reads.
pub(super) struct Projection<'a> {
    pub(super) component: &'a str,
    pub(super) facts: &'a Adapter,
    pub(super) seen: &'a BTreeMap<Sight, ImageEmbedding>,
    pub(super) identities: &'a Identities,
    /// How much of what is seen of a face is added to what its identity says.
    pub(super) shortcut: f32,
}

impl Projection<'_> {
    /// The tokens `[tokens, context]` of one picture.
    pub(super) fn tokens(&self, session: &mut Session, shown: &Shown) -> Result<Array2<f32>> {
        let mut inputs = Vec::new();
        if self.facts.form.reads_identities() {
            let identity = shown.identity.as_ref();
            let identity = identity.and_then(|identity| self.identities.get(identity));
            let identity = identity.ok_or_else(|| missing(self.component, names::ID_EMBEDS))?;
            inputs.push((names::ID_EMBEDS, identity.clone()));
        }
        match self.facts.form {
            AdapterForm::Base => inputs.push((names::IMAGE_EMBEDS, self.pooled(shown)?)),
            AdapterForm::Plus | AdapterForm::Full => inputs.push(self.hidden(shown)?),
            AdapterForm::Faceid => {}
            AdapterForm::FaceidPlusv2 => {
                inputs.push(self.hidden(shown)?);
                let shortcut = ArrayD::from_elem(IxDyn(&[1]), self.shortcut);
                inputs.push((names::SHORTCUT_SCALE, shortcut));
            }
        }
        let inputs = inputs.into_iter();
        let inputs = inputs.map(|(name, values)| (name, Tensor::F32(values)));
        let inputs = inputs.collect::<Vec<_>>();
        let feeds = inputs.iter().map(|(name, tensor)| (*name, tensor));
        let mut outputs = session.run(&feeds.collect::<Vec<_>>())?;
        let tokens = finite(&mut outputs, self.component, names::IP_HIDDEN_STATES)?;
        let fail = |actual: String| Error::Contract {
            graph: self.component.to_owned(),
            tensor: names::IP_HIDDEN_STATES.into(),
            expected: format!("[1, {}, context]", self.facts.tokens),
            actual,
        };
        let tokens = tokens
            .into_dimensionality::<Ix3>()
            .map_err(|e| fail(e.to_string()))?;
        if (tokens.dim().0, tokens.dim().1) != (1, self.facts.tokens) {
            return Err(fail(format!("{:?}", tokens.shape())));
        }
        Ok(tokens.index_axis_move(Axis(0), 0))
    }

    fn hidden(&self, shown: &Shown) -> Result<(&'static str, ArrayD<f32>)> {
        let seen = shown.sight.as_ref().and_then(|sight| self.seen.get(sight));
        let seen = seen.ok_or_else(|| missing(self.component, names::HIDDEN_STATES))?;
        Ok((names::HIDDEN_STATES, seen.hidden_states.clone()))
    }

    /// The pooled embedding; of nothing, zeros as wide as that of any picture.
    fn pooled(&self, shown: &Shown) -> Result<ArrayD<f32>> {
        let missing = || missing(self.component, names::IMAGE_EMBEDS);
        let sight = shown.sight.as_ref().ok_or_else(missing)?;
        if *sight == Sight::Nothing {
            let any = self.seen.values().next().ok_or_else(missing)?;
            return Ok(ArrayD::zeros(any.image_embeds.raw_dim()));
        }
        let seen = self.seen.get(sight).ok_or_else(missing)?;
        Ok(seen.image_embeds.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, form: AdapterForm) -> (Vec<Shown>, Shown) {
        let prompt: ImagePrompt = text.parse().unwrap();
        (Shown::of(&prompt, form), Shown::negative(&prompt, form))
    }

    fn seen(path: &str) -> Sight {
        Sight::File(path.into(), crate::request::Crop::Center)
    }

    fn known(path: &str) -> Identity {
        Identity::File(path.into())
    }

    #[test]
    fn an_adapter_is_shown_what_its_form_reads() {
        let (positive, negative) = shown("a=x.png,y.png", AdapterForm::Plus);
        let sights = positive.into_iter().map(|s| (s.sight, s.identity));
        assert_eq!(
            sights.collect::<Vec<_>>(),
            [(Some(seen("x.png")), None), (Some(seen("y.png")), None)]
        );
        assert_eq!(negative.sight(AdapterForm::Plus), Some(&Sight::Nothing));
        assert_eq!(negative.sight(AdapterForm::Base), None);
        let (positive, negative) = shown("a=x.npy", AdapterForm::Faceid);
        assert_eq!(
            (&positive[0].sight, &positive[0].identity),
            (&None, &Some(known("x.npy")))
        );
        assert_eq!(
            (negative.sight, negative.identity),
            (None, Some(Identity::Nobody))
        );
        let faces = "a=x.npy,y.npy@face=x.png,y.png@negative=z.npy@negative-face=z.png";
        let (positive, negative) = shown(faces, AdapterForm::FaceidPlusv2);
        let both = positive.into_iter().map(|s| (s.sight, s.identity));
        assert_eq!(
            both.collect::<Vec<_>>(),
            [
                (Some(seen("x.png")), Some(known("x.npy"))),
                (Some(seen("y.png")), Some(known("y.npy")))
            ]
        );
        assert_eq!(
            (negative.sight, negative.identity),
            (Some(seen("z.png")), Some(known("z.npy")))
        );
    }
}
