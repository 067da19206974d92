//! What an image encoder saw in a picture, in a file: an image prompt without the picture and without the encoder.

use std::collections::HashMap;
use std::path::Path;

use ndarray::{ArrayD, IxDyn};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::image_embedding::ImageEmbedding;
use crate::error::{Error, Result, quoted};
use crate::files::{Pending, read_input, write_pending};
use crate::plan::names;
use crate::tensor::all_finite;

/// Key of the metadata that names the encoder.
const ENCODER: &str = "tronie.image_encoder";
/// Hidden states of the unconditional picture, so that guidance needs no encoder either. Files of older versions have none.
const UNCONDITIONAL: &str = "unconditional_hidden_states";
/// A picture's embeddings are about 3 MB.
const MAX_BYTES: u64 = 1 << 28;
/// What such files end with.
const EXTENSION: &str = "safetensors";

impl ImageEmbedding {
    /// Whether a file is, by its name, one of embeddings and not a picture.
    pub fn is_file(path: &Path) -> bool {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case(EXTENSION))
    }

    /// Writes it beside its target; [`Pending::publish`] puts it in place. `encoder` is the catalogue's name of the network
    /// that saw the picture.
    ///
    /// # Errors
    /// [`Error::Output`]; [`Error::Request`] (`output`) for a name that does not end in `.safetensors`.
    pub fn save(&self, path: &Path, encoder: &str) -> Result<Pending> {
        if !Self::is_file(path) {
            let reason = format!("{} does not end in .{EXTENSION}", path.display());
            return Err(Error::request("output", reason));
        }
        let fail = |e: safetensors::SafeTensorError| Error::Output {
            path: path.to_owned(),
            source: std::io::Error::other(e.to_string()),
        };
        let parts = [
            (names::HIDDEN_STATES, &self.hidden_states),
            (names::IMAGE_EMBEDS, &self.image_embeds),
        ];
        let nothing = self.unconditional_hidden_states.iter();
        let parts = parts.into_iter();
        let parts = parts.chain(nothing.map(|nothing| (UNCONDITIONAL, nothing)));
        let bytes = parts.map(|(name, array)| {
            let values = array.iter().flat_map(|v| v.to_le_bytes());
            (name, array.shape().to_vec(), values.collect::<Vec<u8>>())
        });
        let bytes = bytes.collect::<Vec<_>>();
        let views = bytes.iter().map(|(name, shape, data)| {
            TensorView::new(Dtype::F32, shape.clone(), data).map(|view| (*name, view))
        });
        let views = views.collect::<Result<Vec<_>, _>>().map_err(fail)?;
        let metadata = HashMap::from([(ENCODER.to_owned(), encoder.to_owned())]);
        let file = safetensors::serialize(views, Some(metadata)).map_err(fail)?;
        write_pending(path, |to| to.write_all(&file))
    }

    /// Reads what `encoder` saw.
    ///
    /// # Errors
    /// [`Error::Input`] when the file is not whole, is of another encoder, or holds something other than the finite f32
    /// embeddings of one picture.
    pub fn load(path: &Path, encoder: &str) -> Result<Self> {
        let fail = |reason: String| Error::Input {
            path: path.to_owned(),
            reason,
        };
        let bytes = read_input(path, MAX_BYTES)?;
        let whole = |e| fail(format!("is not a whole safetensors file: {e}"));
        let file = SafeTensors::deserialize(&bytes).map_err(whole)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(whole)?;
        let made_by = header.metadata().as_ref().and_then(|m| m.get(ENCODER));
        let Some(made_by) = made_by else {
            return Err(fail(
                "names no image encoder; it was not made by `tronie embed`".into(),
            ));
        };
        if made_by != encoder {
            let made_by = quoted(made_by);
            return Err(fail(format!(
                "was made by the image encoder {made_by}, but the adapter needs `{encoder}`; make it again with `tronie embed`"
            )));
        }
        let tensor = |name| tensor(&file, name).map_err(fail);
        Ok(Self {
            image_embeds: tensor(names::IMAGE_EMBEDS)?,
            hidden_states: tensor(names::HIDDEN_STATES)?,
            unconditional_hidden_states: match file.tensor(UNCONDITIONAL) {
                Ok(_) => Some(tensor(UNCONDITIONAL)?),
                Err(_) => None,
            },
        })
    }
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> Result<ArrayD<f32>, String> {
    let view = file.tensor(name).map_err(|e| e.to_string())?;
    if view.dtype() != Dtype::F32 {
        return Err(format!("`{name}` is {:?}, not F32", view.dtype()));
    }
    let values = view.data().as_chunks().0.iter();
    let values = values.map(|b| f32::from_le_bytes(*b)).collect();
    let array = ArrayD::from_shape_vec(IxDyn(view.shape()), values).map_err(|e| e.to_string())?;
    if array.is_empty() || array.shape()[0] != 1 || !all_finite(&array) {
        let shape = array.shape();
        return Err(format!(
            "`{name}` {shape:?} is empty, not finite, or of several pictures"
        ));
    }
    Ok(array)
}
