//! `ZipLoRA` without gradients: what the attention layers see with each of two `LoRA`s is recorded, and decides how the
//! columns of both are merged into one.
//!
//! No training images are needed: each `LoRA` paints its own pictures from its prompt, and what its layers see on the way
//! is what counts. Python twin: `export/golden/zip.py`; the published way, with gradients, is `export/zip.py`. Paper:
//! arXiv:2311.13600.

mod measure;
mod record;

use std::collections::{BTreeMap, HashMap};

pub use measure::Lost;

use super::Pipeline;
use crate::error::{Error, Result};
use crate::lora::{Fit, LoraFile, Mergers, Pair, Terms};
use crate::model_file::ModelFile;
use crate::progress::Observer;
use crate::request::{LoraUse, Request, Resolved};

/// Fields of the two sides, content first, as the command line names them.
const SIDES: [&str; 2] = ["content", "style"];
const PROMPTS: [&str; 2] = ["prompt-content", "prompt-style"];

/// Two `LoRA`s and how they are merged.
#[derive(Debug, Clone, Default)]
pub struct Zipping {
    /// How their pictures are painted: model, steps, size, batch, seed, guidance. Prompt and `LoRA`s are the sides' own.
    pub request: Request,
    /// Content and style: names of the catalogue's `loras`, otherwise files.
    pub loras: [String; 2],
    /// A prompt for each that calls what it was trained for.
    pub prompts: [String; 2],
    /// How strongly mergers are drawn to 1, and away from each other.
    pub terms: Terms,
}

/// The result of a merge.
#[derive(Debug, Clone)]
pub struct Zipped {
    /// The merged `LoRA`, a safetensors file.
    pub lora: Vec<u8>,
    /// The mergers by module of the `UNet`.
    pub mergers: BTreeMap<String, Mergers>,
    /// Layers of either `LoRA` that have no mergers and are added up.
    pub added: usize,
}

impl Zipping {
    fn check(&self) -> Result<()> {
        for (prompt, field) in self.prompts.iter().zip(PROMPTS) {
            if prompt.trim().is_empty() {
                let reason = "is empty: give one with the words that the LoRA was trained to";
                return Err(Error::request(field, reason));
            }
        }
        let (request, terms) = (&self.request, self.terms);
        if !(terms.ridge > 0.0 && terms.ridge.is_finite()) {
            return Err(Error::request("ridge", "must be a number greater than 0"));
        }
        if !(terms.similarity >= 0.0 && terms.similarity.is_finite()) {
            return Err(Error::request(
                "similarity",
                "must be a number of at least 0",
            ));
        }
        let others = [
            (request.refiner.is_some(), "refiner"),
            (request.image_prompts.is_some(), "image-prompt"),
            (request.latents_in.is_some(), "latents-in"),
        ];
        match others.iter().find(|(given, _)| *given) {
            Some((_, field)) => Err(Error::request(
                field,
                "is of no use to a merge: leave it out",
            )),
            None => Ok(()),
        }
    }
}

impl Pipeline {
    /// Works out mergers and the merged `LoRA`.
    ///
    /// # Errors
    /// [`Error::Request`] for unusable fields or `LoRA`s, otherwise those of painting with either `LoRA`.
    pub fn zip(&self, zipping: &Zipping, observer: &mut Observer<'_>) -> Result<Zipped> {
        zipping.check()?;
        let fits = self.fits(zipping, observer)?;
        let pair = Pair::of(&fits[0], &fits[1])?;
        let settled = self.settled(zipping, observer)?;
        let mergers = self.mergers(&pair, &settled, observer)?;
        finish(&pair, mergers, zipping)
    }

    /// Merges with mergers out of a file ([`Mergers::read`]); nothing is painted.
    ///
    /// # Errors
    /// [`Error::Request`] for unusable `LoRA`s, those of [`Mergers::read`].
    pub fn zip_with(
        &self,
        zipping: &Zipping,
        mergers: &ModelFile,
        observer: &mut Observer<'_>,
    ) -> Result<Zipped> {
        let fits = self.fits(zipping, observer)?;
        let pair = Pair::of(&fits[0], &fits[1])?;
        finish(&pair, Mergers::read(mergers, &pair)?, zipping)
    }

    /// Opens both `LoRA`s and fits them to the model.
    fn fits(&self, zipping: &Zipping, observer: &mut Observer<'_>) -> Result<[Fit; 2]> {
        let name = zipping.request.model_name(self.catalogue())?;
        let [content, style] = self.zip_files(zipping, observer)?;
        let targets = self.targets(&name, observer)?;
        let targets = targets.iter().map(|(key, weights)| (key.clone(), weights));
        let targets = targets.collect();
        let fit = |file| Ok::<_, Error>(LoraFile::open(file)?.fit(&targets));
        Ok([fit(&content)?, fit(&style)?])
    }

    fn zip_files(&self, zipping: &Zipping, observer: &mut Observer<'_>) -> Result<[ModelFile; 2]> {
        let content = self.lora_file(&zipping.loras[0], observer)?;
        let style = self.lora_file(&zipping.loras[1], observer)?;
        let whole = |file: &ModelFile| file.path().canonicalize().unwrap_or(file.path());
        if whole(&content) == whole(&style) {
            let reason = "is --content too; a LoRA merged with itself is that LoRA";
            return Err(Error::request(SIDES[1], reason));
        }
        Ok([content, style])
    }

    /// The same with a memory mode, so that it is chosen and told once.
    fn settled(&self, zipping: &Zipping, observer: &mut Observer<'_>) -> Result<Zipping> {
        let mut settled = zipping.clone();
        let resolved = self.zip_request(zipping, 0, &zipping.loras, observer)?;
        settled.request.memory = resolved.request.memory;
        Ok(settled)
    }

    /// A request of one side's prompt with some `LoRA`s.
    fn zip_request(
        &self,
        zipping: &Zipping,
        side: usize,
        loras: &[String],
        observer: &mut Observer<'_>,
    ) -> Result<Resolved> {
        let with = loras.iter().map(|lora| LoraUse {
            lora: lora.clone(),
            scale: 1.0,
            te_scale: None,
        });
        let request = Request {
            prompt: zipping.prompts[side].clone(),
            loras: (!loras.is_empty()).then(|| with.collect()),
            ..zipping.request.clone()
        };
        let (mut resolved, _) = self.begin(&request)?;
        self.settle_memory(&mut resolved, observer)?;
        Ok(resolved)
    }
}

fn finish(
    pair: &Pair<'_>,
    mergers: BTreeMap<String, Mergers>,
    zipping: &Zipping,
) -> Result<Zipped> {
    let [content, style] = &zipping.loras;
    let made = format!("tronie lora zip of {content} and {style}");
    let metadata = HashMap::from([("tronie.made".to_owned(), made)]);
    Ok(Zipped {
        lora: pair.merged(&mergers, metadata)?,
        mergers,
        added: pair.added(),
    })
}
