//! Checks of image prompts against the model.

use super::super::{ImagePrompt, Request};
use crate::error::{Error, Result};
use crate::manifest::Model;

/// The field's name on the command line.
const FIELD: &str = "image-prompt";

impl Request {
    /// Places in the request of the image prompts that the UNet hears at all, after all have been checked.
    pub(super) fn heard_images(&self, model: &Model) -> Result<Vec<usize>> {
        let mut heard = Vec::new();
        for (at, prompt) in self.image_prompts.iter().flatten().enumerate() {
            let scales = prompt.check(model)?;
            if scales.iter().any(|scale| *scale != 0.0) {
                heard.push(at);
            }
        }
        Ok(heard)
    }
}

impl ImagePrompt {
    /// The scales of the UNet's modules, after everything has been checked.
    fn check(&self, model: &Model) -> Result<Vec<f64>> {
        let adapter = model.adapter(&self.adapter)?;
        let fail = |reason: String| {
            Err(Error::request(
                FIELD,
                format!("`{}`: {reason}", self.adapter),
            ))
        };
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
        adapter.encoder(&self.adapter)?;
        self.scales(&model.unet.attentions)
    }
}
