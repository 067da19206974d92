//! Whole models in one file, in the original layout: what a file is, and whose graphs and constants it takes.
//!
//! A file that a request names in place of a model becomes an entry of the catalogue, under its path: a copy of the entry
//! whose graphs its tensors fit by name and shape, with the file for weights. So everything that runs a model runs a file.
//!
//! Python twin: diffusers' `from_single_file`.

mod fit;
mod recognise;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::manifest::{Catalogue, FileRef, Model};
use crate::request::Request;
use crate::weights::Weights;
use recognise::Marks;

/// Adds the models of all files that a request names in place of a model.
///
/// # Errors
/// [`Error::Missing`] if a file is not there; [`Error::Weights`] if it is not a whole model of SDXL's architecture that
/// an entry of the catalogue has graphs for: the reason says what it is instead, what it lacks, and what to do.
pub fn open(catalogue: &Catalogue, request: &Request) -> Result<()> {
    for name in [&request.model, &request.refiner].into_iter().flatten() {
        if let Some(path) = catalogue.file_of(name)
            && !catalogue.has_added(name)
        {
            catalogue.add(name, model_of(catalogue, &path)?);
        }
    }
    Ok(())
}

/// The weights of one component of a whole model's file, under the names that `needed` are of.
///
/// # Errors
/// [`Error::Weights`] if the file is something else, or does not have the component.
pub fn component<'n>(
    file: &Weights,
    key: &str,
    needed: impl IntoIterator<Item = &'n str>,
) -> Result<Weights> {
    Marks::of(file)?;
    let component = file.components()?.remove(key);
    let component = component.ok_or_else(|| fault(file, fit::lacks(key)))?;
    Ok(component.named_as(needed))
}

/// What speaks against a file for an entry that names it: that it was trained to predict something else.
///
/// # Errors
/// [`Error::Weights`] if the file is something else.
pub fn advice(file: &Weights, model: &Model) -> Result<Option<String>> {
    let marks = Marks::of(file)?;
    let Some(found) = marks
        .prediction
        .filter(|found| !marks.agrees(model, *found))
    else {
        return Ok(None);
    };
    let zero_snr = if marks.zero_snr {
        ", rescale_betas_zero_snr: true"
    } else {
        ""
    };
    Ok(Some(format!(
        "{} says that it was trained otherwise than its entry in the catalogue; there it wants `scheduler: \
         {{prediction_type: {}{zero_snr}}}`",
        path_of(file).display(),
        found.key()
    )))
}

/// The model of a file: the fitting entry with the file for weights, and what the file says of its training.
fn model_of(catalogue: &Catalogue, path: &Path) -> Result<Model> {
    let file = Weights::open(&[path])?;
    let marks = Marks::of(&file)?;
    let (name, entry) = fit::entry(catalogue, &file, marks)?;
    let mut model = entry.clone().with_checkpoint(FileRef::Given(path.into()));
    model.origin = path.display().to_string();
    model.licence = None;
    model.like = Some(name.to_owned());
    if let Some(prediction) = marks.prediction {
        model.scheduler = model.scheduler.with("prediction_type", prediction.key());
    }
    if marks.zero_snr {
        model.scheduler = model.scheduler.with("rescale_betas_zero_snr", true);
    }
    Ok(model)
}

fn fault(file: &Weights, reason: impl Into<String>) -> Error {
    Error::Weights {
        path: path_of(file),
        reason: reason.into(),
    }
}

fn path_of(file: &Weights) -> PathBuf {
    file.paths().next().map(Path::to_owned).unwrap_or_default()
}
