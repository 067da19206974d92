//! Two `LoRA`s as one file: attention layers of the `UNet` that both change scaled by their mergers, the others added up.
//!
//! Scaling a column of `B A` scales that column of `A`, so the merge is an ordinary low-rank `LoRA` of the ranks' sum:
//! `[B_c | B_s]` and `[A_c diag(m_c); A_s diag(m_s)]`.
//!
//! Python twin: `export/zip_lora.py`. Paper: `ZipLoRA`, arXiv:2311.13600.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use ndarray::{Array2, Axis, concatenate};
use safetensors::tensor::{Dtype, TensorView};

use super::zip::{Mergers, Moments, Terms};
use super::{Fit, Form, LowRank, Matched};
use crate::error::{Error, Result, quoted};

/// The component with the layers that have mergers.
const UNET: &str = "unet";
const WEIGHT: &str = ".weight";
/// The ends of the linear layers of attention.
const ATTENTION: [&str; 4] = [".to_q", ".to_k", ".to_v", ".to_out.0"];

/// What is to become one `LoRA`.
#[derive(Debug)]
pub struct Pair<'a> {
    /// By module: what both change in the `UNet`'s attention, content first.
    zipped: BTreeMap<&'a str, [&'a Matched; 2]>,
    /// By component and module: everything else, content first.
    added: BTreeMap<(&'a str, &'a str), Vec<&'a Matched>>,
}

impl<'a> Pair<'a> {
    /// Pairs what a content and a style `LoRA` change in the same model.
    ///
    /// # Errors
    /// [`Error::Request`] (`content` or `style`) if a module is not in the model or cannot be merged by columns, or if
    /// there is no attention layer that both change.
    pub fn of(content: &'a Fit, style: &'a Fit) -> Result<Self> {
        let mut sides = [BTreeMap::new(), BTreeMap::new()];
        for ((fit, side), field) in [content, style].into_iter().zip(&mut sides).zip(FIELDS) {
            for matched in &fit.matched {
                side.insert((matched.component.as_str(), module(matched)?), matched);
                mergeable(matched).map_err(|reason| Error::request(field, reason))?;
            }
            if let [first, rest @ ..] = &fit.unmatched[..] {
                let name = quoted(&first.module);
                let more = match rest.len() {
                    0 => String::new(),
                    more => format!(" ({more} more such modules)"),
                };
                let reason = format!("{name} {}{more}: name a LoRA of this model", first.reason);
                return Err(Error::request(field, reason));
            }
        }
        let [content, mut style] = sides;
        let (mut zipped, mut added) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        for (place, of_content) in content {
            match style.remove(&place) {
                Some(of_style) if is_attention(place) => {
                    zipped.insert(place.1, [of_content, of_style]);
                }
                of_style => {
                    let both = [Some(of_content), of_style];
                    added.insert(place, both.into_iter().flatten().collect());
                }
            }
        }
        added.extend(
            style
                .into_iter()
                .map(|(place, matched)| (place, vec![matched])),
        );
        if zipped.is_empty() {
            let reason = "changes no attention layer of the UNet that the content LoRA changes too, so there is \
                          nothing to zip: use both with --lora";
            return Err(Error::request("style", reason));
        }
        Ok(Self { zipped, added })
    }

    /// The layers that get mergers, with the number of their inputs.
    pub fn layers(&self) -> impl Iterator<Item = (&'a str, usize)> {
        let inputs = |both: &[&Matched; 2]| both[0].shape().get(1).copied().unwrap_or_default();
        self.zipped
            .iter()
            .map(move |(name, both)| (*name, inputs(both)))
    }

    /// How many layers are added up.
    pub fn added(&self) -> usize {
        self.added.len()
    }

    /// The mergers of a layer ([`Mergers::solve`]).
    ///
    /// # Errors
    /// Those of reading the `LoRA`s; [`Error::Weights`] where [`Mergers::solve`] gives a reason.
    pub fn solve(&self, layer: &str, seen: [&Moments; 2], terms: Terms) -> Result<Mergers> {
        let [content, style] = self.updates(layer)?;
        Mergers::solve(&content, &style, seen, terms).map_err(|r| self.fault(layer, &r))
    }

    /// The updates of a layer with mergers, content first.
    pub(super) fn updates(&self, layer: &str) -> Result<[LowRank; 2]> {
        let [content, style] = self.zipped.get(layer).ok_or_else(|| {
            Error::request("mergers", format!("{layer} is not changed by both LoRAs"))
        })?;
        Ok([factors(content)?, factors(style)?])
    }

    pub(super) fn fault(&self, layer: &str, reason: &str) -> Error {
        let file = self.zipped.get(layer).and_then(|both| both[0].path());
        Error::Weights {
            path: file.map(Into::into).unwrap_or_default(),
            reason: format!("{}: {reason}", quoted(layer)),
        }
    }

    /// The merged `LoRA`'s file, in PEFT's names. `mergers` has an entry for each of [`Pair::layers`].
    ///
    /// # Errors
    /// Those of reading the `LoRA`s; [`Error::Request`] (`mergers`) for a layer without, and for numbers that leave f32.
    pub fn merged(
        &self,
        mergers: &BTreeMap<String, Mergers>,
        metadata: HashMap<String, String>,
    ) -> Result<Vec<u8>> {
        let mut tensors = BTreeMap::new();
        for (layer, both) in &self.zipped {
            let wrong = |what: &str| Error::request("mergers", format!("{layer}: {what}"));
            let mergers = mergers.get(*layer).ok_or_else(|| wrong("has none"))?;
            let mut parts = [factors(both[0])?, factors(both[1])?];
            for (part, merger) in parts.iter_mut().zip([&mergers.content, &mergers.style]) {
                for mut row in part.down.rows_mut() {
                    row.zip_mut_with(merger, |a, m| *a = (f64::from(*a) * m) as f32);
                }
                if part.down.iter().any(|a| !a.is_finite()) {
                    return Err(wrong("scales the LoRA beyond finite numbers"));
                }
            }
            put(&mut tensors, (UNET, layer), both[0], &parts)?;
        }
        for (place, all) in &self.added {
            let parts = all.iter().map(|matched| factors(matched));
            put(
                &mut tensors,
                *place,
                all[0],
                &parts.collect::<Result<Vec<_>>>()?,
            )?;
        }
        serialized(&tensors, metadata)
    }
}

/// The flags of the two files.
const FIELDS: [&str; 2] = ["content", "style"];

/// A tensor of the result: its shape and values.
type Part = (Vec<usize>, Array2<f32>);

/// Puts the sum of `parts` into a file, as factors of the tensor that `like` changes.
fn put(
    tensors: &mut BTreeMap<String, Part>,
    (component, module): (&str, &str),
    like: &Matched,
    parts: &[LowRank],
) -> Result<()> {
    let fault = |e: ndarray::ShapeError| Error::Weights {
        path: like.path().map(Into::into).unwrap_or_default(),
        reason: format!("{}: {e}", quoted(module)),
    };
    let side_by_side = |pick: fn(&LowRank) -> &Array2<f32>, axis: usize| {
        let views = parts.iter().map(|part| pick(part).view());
        concatenate(Axis(axis), &views.collect::<Vec<_>>()).map_err(fault)
    };
    let (down, up) = (side_by_side(|p| &p.down, 0)?, side_by_side(|p| &p.up, 1)?);
    let rank = down.nrows();
    let kernel = like.shape().get(2..).unwrap_or_default();
    let inputs = like.shape().get(1..).unwrap_or_default();
    let down_shape = [&[rank], inputs].concat();
    let up_shape = [&[up.nrows(), rank], &vec![1; kernel.len()][..]].concat();
    tensors.insert(
        format!("{component}.{module}.lora_A.weight"),
        (down_shape, down),
    );
    tensors.insert(
        format!("{component}.{module}.lora_B.weight"),
        (up_shape, up),
    );
    Ok(())
}

/// A safetensors file of f32 tensors.
pub(super) fn serialized(
    tensors: &BTreeMap<String, Part>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>> {
    let bytes = tensors.iter().map(|(name, (shape, values))| {
        let bytes = match values.as_slice() {
            Some(values) if cfg!(target_endian = "little") => {
                Cow::Borrowed(bytemuck::cast_slice::<f32, u8>(values))
            }
            _ => Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        };
        (name, shape, bytes)
    });
    let bytes = bytes.collect::<Vec<_>>();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        TensorView::new(Dtype::F32, (*shape).clone(), bytes).map(|view| (*name, view))
    });
    let fail = |e: safetensors::SafeTensorError| Error::request("output", e.to_string());
    let views = views.collect::<Result<Vec<_>, _>>().map_err(fail)?;
    safetensors::serialize(views, Some(metadata)).map_err(fail)
}

fn factors(matched: &Matched) -> Result<LowRank> {
    let name = quoted(&matched.module);
    let fault = |reason: String| Error::Weights {
        path: matched.path().map(Into::into).unwrap_or_default(),
        reason,
    };
    let factors = matched.low_rank()?;
    let factors = factors.ok_or_else(|| fault(format!("{name} is not two matrices")))?;
    if factors
        .up
        .iter()
        .chain(&factors.down)
        .any(|v| !v.is_finite())
    {
        return Err(fault(format!("{name} holds numbers that are not finite")));
    }
    Ok(factors)
}

/// The module that a weight belongs to.
fn module(matched: &Matched) -> Result<&str> {
    let field = "content and style";
    matched.tensor.strip_suffix(WEIGHT).ok_or_else(|| {
        let name = quoted(&matched.module);
        Error::request(
            "style",
            format!("{field}: {name} changes a bias, which no low-rank LoRA holds"),
        )
    })
}

/// Why a change cannot be part of a low-rank sum.
fn mergeable(matched: &Matched) -> Result<(), String> {
    let name = quoted(&matched.module);
    if matched.dora.is_some() {
        return Err(format!(
            "{name} has a magnitude (DoRA), so it is not low-rank: use it with --lora"
        ));
    }
    match matched.form {
        Form::Linear | Form::Conv => Ok(()),
        other => Err(format!(
            "{name} is stored as {other}; only low-rank changes, two matrices, can be zipped: use it with --lora"
        )),
    }
}

fn is_attention((component, module): (&str, &str)) -> bool {
    let mut parts = module.rsplit('.');
    let ends = ATTENTION.iter().any(|end| module.ends_with(end));
    component == UNET && ends && parts.any(|part| part == "attn1" || part == "attn2")
}
