//! How much of each `LoRA`'s effect a merge loses, at places that it was not made from.

use super::Zipping;
use super::record::{Run, visit};
use crate::error::{Error, Result};
use crate::pipeline::Pipeline;
use crate::plan::names;
use crate::progress::{Control, Event, Observer};
use crate::tensor::Tensor;

/// What share of a `LoRA`'s effect is lost: `|ε_merged - ε_single|² / |ε_single - ε_base|²`, summed over all steps of pictures
/// that the single `LoRA` paints from its prompt. 0 is the `LoRA` itself; 1 is an error as large as its effect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lost {
    /// By the merged `LoRA`.
    pub zipped: f64,
    /// By both `LoRA`s side by side, plainly added up.
    pub added: f64,
}

impl Pipeline {
    /// Compares a merged `LoRA`, a file, with the two that it was made of: content first. Name a request with another seed
    /// than the merge's, so that the places are other ones.
    ///
    /// # Errors
    /// Those of painting; [`Error::Request`] for a `LoRA` that has no effect on its prompt.
    pub fn zip_lost(
        &self,
        zipping: &Zipping,
        merged: &str,
        observer: &mut Observer<'_>,
    ) -> Result<[Lost; 2]> {
        zipping.check()?;
        let zipping = &self.settled(zipping, observer)?;
        let mut lost = [Lost {
            zipped: 0.0,
            added: 0.0,
        }; 2];
        for (side, lost) in lost.iter_mut().enumerate() {
            let run = self.painted(zipping, side, observer)?;
            let single =
                self.predicted((zipping, side), &run, &zipping.loras[side..=side], observer)?;
            let base = self.predicted((zipping, side), &run, &[], observer)?;
            let effect = apart(&single, &base);
            if effect <= 0.0 {
                let reason = "changes nothing with its prompt";
                return Err(Error::request(super::SIDES[side], reason));
            }
            let merged = [merged.to_owned()];
            let zipped = self.predicted((zipping, side), &run, &merged, observer)?;
            let added = self.predicted((zipping, side), &run, &zipping.loras, observer)?;
            lost.zipped = apart(&zipped, &single) / effect;
            lost.added = apart(&added, &single) / effect;
        }
        Ok(lost)
    }

    /// What the `UNet` predicts with some `LoRA`s at the places of a run, one after the other.
    fn predicted(
        &self,
        (zipping, side): (&Zipping, usize),
        at: &Run,
        loras: &[String],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<f32>> {
        // What a run would cost is not what this costs.
        let observer: &mut Observer<'_> = &mut |event| match event {
            Event::Note(_) => Control::Continue,
            event => observer(event),
        };
        let resolved = self.zip_request(zipping, side, loras, observer)?;
        let schedule = at.plan.schedule.clone();
        let steps = schedule.steps();
        let plan = self.prepare(&resolved, schedule, &(0..steps), observer)?;
        let loading = self.loading(resolved.memory(), &resolved.lora_set(), observer)?;
        let mut unet = self.network(&resolved.model, names::UNET, &loading, observer)?;
        let mut all = Vec::new();
        visit(&plan, &at.visits, &mut unet.session, |mut outputs| {
            if let Some(Tensor::F32(output)) = outputs.remove(names::OUT_SAMPLE) {
                all.extend(output);
            }
            Ok(())
        })?;
        self.give_back(unet);
        Ok(all)
    }
}

/// The squared distance.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum()
}
