//! Checks of image prompts against the model.

use super::super::{ImagePrompt, ImageScale, Request};
use crate::error::{Error, Result};
use crate::manifest::{AdapterForm, Model};

/// The field's name on the command line.
const FIELD: &str = "image-prompt";

impl Request {
    /// Places in the request of the image prompts that the UNet hears at all, after all have been checked.
    pub(super) fn heard_images(&self, model: &Model) -> Result<Vec<usize>> {
        let mut heard = Vec::new();
        for (at, prompt) in self.image_prompts.iter().flatten().enumerate() {
            let scales = prompt.check(model)?;
            if scales.iter().flatten().any(|scale| *scale != 0.0) {
                heard.push(at);
            }
        }
        Ok(heard)
    }
}

impl ImagePrompt {
    /// The scales of the UNet's modules, of each masked picture or of all, after everything has been checked.
    fn check(&self, model: &Model) -> Result<Vec<Vec<f64>>> {
        let adapter = model.adapter(&self.adapter)?;
        let told = |reason: String| Error::request(FIELD, format!("`{}`: {reason}", self.adapter));
        let fail = |reason: String| Err(told(reason));
        let (pictures, masks) = (self.pictures.len(), self.masks.len());
        if pictures == 0 {
            return fail("has no picture; name one at least".into());
        }
        if masks != 0 && masks != pictures {
            return fail(format!(
                "has {masks} masks for {pictures} pictures; give one a picture, or none"
            ));
        }
        if let Some(share) = self.steps
            && !(0.0 <= share.start && share.start < share.end && share.end <= 1.0)
        {
            return fail(format!(
                "steps {share} are no share of the steps: 0 <= START < END <= 1"
            ));
        }
        if let Some(ImageScale::Each(scales)) = &self.scale
            && scales.len() != masks
        {
            let scales = scales.len();
            return fail(format!(
                "has {scales} scales for {masks} masks; give one scale, or one for each masked picture"
            ));
        }
        self.check_faces(adapter.form).map_err(told)?;
        self.scales(&model.unet.attentions)
    }

    /// What belongs to adapters that see faces beside their identities, and to no other.
    fn check_faces(&self, form: AdapterForm) -> Result<(), String> {
        if form != AdapterForm::FaceidPlusv2 {
            let given = [
                ("face", !self.faces.is_empty()),
                ("negative-face", self.negative_face.is_some()),
                ("shortcut", self.shortcut.is_some()),
            ];
            return match given.into_iter().find(|(_, given)| *given) {
                None => Ok(()),
                Some((part, _)) => Err(format!(
                    "is of the form {}, which has no {part}; only faceid-plusv2 sees faces beside identities",
                    form.name()
                )),
            };
        }
        let (identities, faces) = (self.pictures.len(), self.faces.len());
        if faces != identities {
            return Err(format!(
                "has {faces} pictures of faces for {identities} identities; give one an identity: @face=FILE[,FILE…]"
            ));
        }
        if self.negative.is_some() != self.negative_face.is_some() {
            return Err(
                "needs negative, an identity, and negative-face, a picture, both or neither".into(),
            );
        }
        if self
            .shortcut
            .is_some_and(|scale| !(scale as f32).is_finite())
        {
            return Err("shortcut is not a finite number in f32".into());
        }
        Ok(())
    }
}
