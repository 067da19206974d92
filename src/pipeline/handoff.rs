//! Latents between two networks, two runs or two processes.
//!
//! The file is safetensors: `latents` `[batch, channels, h, w]` f32 in diffusers' convention for the scheduler, the
//! scheduler's memory as `history.0`, …, and in the metadata the request, the next step and the state of the noise.

use std::collections::HashMap;
use std::path::Path;

use ndarray::Array4;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{Pending, read_input, write_pending};
use crate::noise::{Noise, NoisePosition};
use crate::plan::Plan;
use crate::request::Request;
use crate::tensor::{Latents, all_finite};

/// Key of the metadata entry.
const KEY: &str = "tronie";
/// Version of what the entry says.
const FORMAT: u32 = 1;
/// A file of latents is small; a larger one is something else.
const MAX_BYTES: u64 = 1 << 30;

/// Everything a run needs to go on: unlike a picture, it can be refined, stopped and resumed.
#[derive(Debug, Clone)]
pub struct LatentHandoff {
    /// The latents, in the scheduler's convention.
    pub latents: Latents,
    /// The step that comes next, zero-based; the schedule's length when there is none.
    pub next_step: usize,
    /// The noise generator where the run left it.
    pub noise: Noise,
    /// What a multistep scheduler remembers, newest last.
    pub history: Vec<Latents>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    format: u32,
    next_step: usize,
    noise: Positions,
    request: Request,
}

/// Where the noise stands: one generator, or several.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Positions {
    One(NoisePosition),
    Several(Vec<NoisePosition>),
}

impl Positions {
    fn of(noise: &Noise) -> Self {
        match noise.positions()[..] {
            [one] => Self::One(one),
            ref several => Self::Several(several.to_vec()),
        }
    }

    fn replay(&self) -> Result<Noise> {
        match self {
            Self::One(one) => Noise::replay(std::slice::from_ref(one)),
            Self::Several(several) => Noise::replay(several),
        }
    }
}

impl LatentHandoff {
    /// The handoff of a run that has not begun.
    pub fn start(latents: Latents, noise: Noise) -> Self {
        Self {
            latents,
            next_step: 0,
            noise,
            history: Vec::new(),
        }
    }

    /// Itself, if it belongs to `plan`; `origin` is the file it came from.
    pub(super) fn fitting(self, plan: &Plan, origin: Option<&Path>) -> Result<Self> {
        let fail = |reason: String| Error::Input {
            path: origin.map(Path::to_owned).unwrap_or_default(),
            reason,
        };
        if self.latents.shape() != plan.latents {
            return Err(fail(format!(
                "has latents {:?}, the request needs {:?}",
                self.latents.shape(),
                plan.latents
            )));
        }
        if self.next_step > plan.schedule.steps() {
            let (next, len) = (self.next_step, plan.schedule.steps());
            return Err(fail(format!(
                "says that step {next} comes next, but the schedule has {len}"
            )));
        }
        Ok(self)
    }

    /// Writes the handoff, with the request that the run belongs to, beside its target; [`Pending::publish`] puts it in place.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn save(&self, path: &Path, request: &Request) -> Result<Pending> {
        let fail = |reason: String| Error::Output {
            path: path.to_owned(),
            source: std::io::Error::other(reason),
        };
        let meta = Meta {
            format: FORMAT,
            next_step: self.next_step,
            noise: Positions::of(&self.noise),
            request: request.without_places(),
        };
        let meta = serde_json::to_string(&meta).map_err(|e| fail(e.to_string()))?;
        let bytes = |a: &Latents| a.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut named = vec![(
            "latents".to_owned(),
            self.latents.shape().to_vec(),
            bytes(&self.latents),
        )];
        named.extend(
            self.history
                .iter()
                .enumerate()
                .map(|(i, h)| (format!("history.{i}"), h.shape().to_vec(), bytes(h))),
        );
        let views = named
            .iter()
            .map(|(name, shape, data)| {
                TensorView::new(Dtype::F32, shape.clone(), data).map(|v| (name.as_str(), v))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| fail(e.to_string()))?;
        let metadata = HashMap::from([(KEY.to_owned(), meta)]);
        let file =
            safetensors::serialize(views, Some(metadata)).map_err(|e| fail(e.to_string()))?;
        write_pending(path, |to| to.write_all(&file))
    }

    /// Reads a handoff and the request it belongs to.
    ///
    /// # Errors
    /// [`Error::Input`] when the file is not whole, not tronie's, or holds something other than finite f32 latents.
    pub fn load(path: &Path) -> Result<(Self, Request)> {
        let fail = |reason: String| Error::Input {
            path: path.to_owned(),
            reason,
        };
        let bytes = read_input(path, MAX_BYTES)?;
        let meta = Meta::of(&bytes).map_err(fail)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let latents = read(&file, "latents").map_err(fail)?;
        let remembered = file
            .names()
            .iter()
            .filter(|n| n.starts_with("history."))
            .count();
        let history = (0..remembered).map(|i| read(&file, &format!("history.{i}")));
        let history = history.collect::<Result<Vec<_>, _>>().map_err(fail)?;
        if history.iter().any(|h| h.dim() != latents.dim()) {
            return Err(fail(
                "its history has another shape than its latents".into(),
            ));
        }
        let noise = meta.noise.replay().map_err(|e| fail(e.to_string()))?;
        Ok((
            Self {
                latents,
                next_step: meta.next_step,
                noise,
                history,
            },
            meta.request,
        ))
    }

    /// Reads only the request that a handoff belongs to.
    ///
    /// # Errors
    /// [`Error::Input`] when the file is not whole or not tronie's.
    pub fn load_request(path: &Path) -> Result<Request> {
        let meta = Meta::of(&read_input(path, MAX_BYTES)?);
        let meta = meta.map_err(|reason| Error::Input {
            path: path.to_owned(),
            reason,
        })?;
        Ok(meta.request)
    }
}

impl Meta {
    /// What a file's metadata says.
    fn of(bytes: &[u8]) -> Result<Self, String> {
        // Reads the whole structure first: a file cut short must not pass for a good one.
        let whole = SafeTensors::deserialize(bytes).and_then(|_| SafeTensors::read_metadata(bytes));
        let (_, header) = whole.map_err(|e| format!("is not a whole safetensors file: {e}"))?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let text = text.ok_or("has no request in it; it was not written by --latents-out")?;
        let meta: Self =
            serde_json::from_str(text).map_err(|e| format!("its request cannot be read: {e}"))?;
        if meta.format != FORMAT {
            return Err(format!(
                "has format {}; this tronie reads format {FORMAT}",
                meta.format
            ));
        }
        Ok(meta)
    }
}

fn read(file: &SafeTensors<'_>, name: &str) -> Result<Latents, String> {
    let view = file.tensor(name).map_err(|e| e.to_string())?;
    let &[b, c, h, w] = view.shape() else {
        return Err(format!("`{name}` has shape {:?}, not 4 axes", view.shape()));
    };
    if view.dtype() != Dtype::F32 {
        return Err(format!("`{name}` is {:?}, not F32", view.dtype()));
    }
    let values = view
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let array = Array4::from_shape_vec((b, c, h, w), values).map_err(|e| e.to_string())?;
    if array.is_empty() || !all_finite(&array) {
        return Err(format!("`{name}` is empty or not finite"));
    }
    Ok(array)
}
