//! Views: tensors of a file under other names, of other shape, or only some of their rows. Values are looked at where they
//! lie, except those that are transposed.
//!
//! Python twin: the slices, `squeeze` and `.T` of diffusers' `loaders/single_file_utils.py`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Stored, Weights, original};
use crate::error::{Error, Result, quoted};

/// A stored tensor as a component sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    /// The name in the component.
    name: String,
    /// The name in the file.
    original: String,
    take: Take,
}

/// What is taken of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Take {
    Whole,
    /// Part number `part` of `of` equal parts along the first dimension.
    Rows {
        part: usize,
        of: usize,
    },
    /// `[out, in, 1, 1]` as `[out, in]`.
    Linear,
    /// `[a, b]` as `[b, a]`.
    Transposed,
}

impl View {
    pub(super) fn whole(name: String, original: &str) -> Self {
        Self::new(name, original, Take::Whole)
    }

    pub(super) fn rows(name: String, original: &str, part: usize, of: usize) -> Self {
        Self::new(name, original, Take::Rows { part, of })
    }

    pub(super) fn linear(name: String, original: &str) -> Self {
        Self::new(name, original, Take::Linear)
    }

    pub(super) fn transposed(name: String, original: &str) -> Self {
        Self::new(name, original, Take::Transposed)
    }

    fn new(name: String, original: &str, take: Take) -> Self {
        let original = original.to_owned();
        Self {
            name,
            original,
            take,
        }
    }

    /// The view of a tensor whose name in the file begins with `prefix`.
    pub(super) fn under(self, prefix: &str) -> Self {
        let original = format!("{prefix}{}", self.original);
        Self { original, ..self }
    }

    /// What is looked at, as if it were stored so.
    fn of(&self, stored: &Stored) -> Result<Stored, String> {
        let mut view = stored.clone();
        view.original = Some(self.original.as_str().into());
        let shape = stored.shape.as_slice();
        match (self.take, shape) {
            (Take::Whole, _) => {}
            (Take::Rows { part, of }, [rows, ..]) if rows.is_multiple_of(of) => {
                view.shape[0] = rows / of;
                let bytes = stored.range.len() / of;
                view.range.start += part * bytes;
                view.range.end = view.range.start + bytes;
            }
            (Take::Rows { of, .. }, _) => {
                return Err(format!(
                    "shape {shape:?} cannot be cut into {of} equal parts"
                ));
            }
            (Take::Linear, [.., 1, 1]) => view.shape.truncate(shape.len() - 2),
            (Take::Linear, _) => {
                return Err(format!("shape {shape:?} is not that of a 1x1 convolution"));
            }
            (Take::Transposed, [_, _]) => {
                view.shape.reverse();
                view.is_transposed = true;
            }
            (Take::Transposed, _) => {
                return Err(format!("shape {shape:?} is not that of a matrix"));
            }
        }
        Ok(view)
    }
}

impl Weights {
    /// The components of an all-in-one checkpoint in the original layout, each under diffusers' names, by the catalogue's
    /// key of their weights: `unet`, `vae`, `text_encoder`, `text_encoder_2`. None where no tensor has a name of that
    /// layout.
    ///
    /// # Errors
    /// [`Error::Weights`] if a tensor cannot be seen as what it is in diffusers.
    pub fn components(&self) -> Result<BTreeMap<&'static str, Self>> {
        let tensors = self.tensors.iter();
        let views = original::views(tensors.map(|(name, t)| (name.as_str(), t.shape.len())));
        let mut whole = BTreeMap::new();
        for view in views.values().flatten() {
            if let Some((name, stored)) = self.tensors.get_key_value(&view.original) {
                whole.insert(name.clone(), stored.clone());
            }
        }
        let whole = Arc::new(whole);
        let components = views.into_iter().map(|(key, views)| {
            let tensors = views.into_iter().map(|view| self.viewed(&view));
            let component = Self {
                tensors: tensors.collect::<Result<_>>()?,
                whole: Some(Arc::clone(&whole)),
                ..self.clone()
            };
            Ok((key, component))
        });
        components.collect()
    }

    fn viewed(&self, view: &View) -> Result<(String, Stored)> {
        let stored = &self.tensors[&view.original];
        let seen = view.of(stored).map_err(|reason| Error::Weights {
            path: self.files[stored.file].path.clone(),
            reason: format!("tensor {}: {reason}", quoted(&view.original)),
        })?;
        Ok((view.name.clone(), seen))
    }

    /// The same tensors with the names that `needed` are of: transformers 5 leaves `text_model.` out of the names of a text
    /// encoder without projection, and graphs have the names of the checkpoint that they were exported from.
    #[must_use]
    pub fn named_as<'n>(mut self, needed: impl IntoIterator<Item = &'n str>) -> Self {
        const LEVEL: &str = "text_model.";
        if needed.into_iter().any(|name| name.starts_with(LEVEL)) {
            return self;
        }
        let short = |name: String| name.strip_prefix(LEVEL).map_or(name.clone(), str::to_owned);
        let tensors = self.tensors.into_iter();
        self.tensors = tensors
            .map(|(name, stored)| (short(name), stored))
            .collect();
        self
    }
}
