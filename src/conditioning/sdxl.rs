//! SDXL's prompts and micro-conditioning, for base and refiner alike.
//!
//! Twin: `encode_prompt` and `_get_add_time_ids` of diffusers' `StableDiffusionXLPipeline` and, for models with an
//! aesthetic score, `StableDiffusionXLImg2ImgPipeline`.

use ndarray::{Array2, Array3, Axis, concatenate, s};

use crate::error::{Error, Result};
use crate::manifest::Model;
use crate::request::{Corner, Request, Size};
use crate::text::{Embeddings, Tokenizer, Tokens};

/// diffusers' default `aesthetic_score` and `negative_aesthetic_score`.
const AESTHETIC_SCORES: (f64, f64) = (6.0, 2.5);

/// The texts of a request, by encoder: the first encoder reads `prompt`, the second `prompt_2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    positive: Vec<(&'static str, String)>,
    /// `None` where the negative branch is zeros; empty where guidance is off.
    negative: Option<Vec<(&'static str, String)>>,
    guided: bool,
}

/// Token ids of a request's prompts for one encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// The prompt.
    pub positive: Tokens,
    /// The negative prompt, unless guidance is off or the branch is zeros.
    pub negative: Option<Tokens>,
}

impl Prompts {
    /// The texts that `model` reads. Without guidance there is no negative one; a request without any negative prompt
    /// means zeros for models with `force_zeros_for_empty_prompt`, and the encoded empty text for the others.
    pub fn new(request: &Request, model: &Model, guided: bool) -> Self {
        // Like diffusers' `prompt_2 or prompt`: an empty second prompt is no second prompt.
        let second = |first: &str, second: &Option<String>| {
            let given = second.as_ref().filter(|text| !text.is_empty());
            given.map_or_else(|| first.to_owned(), String::clone)
        };
        let positive = vec![
            ("prompt", request.prompt.clone()),
            ("prompt-2", second(&request.prompt, &request.prompt_2)),
        ];
        // diffusers looks at `negative_prompt` only: `negative_prompt_2` alone does not prevent the zeros.
        let zeros = request.negative.is_none() && model.force_zeros_for_empty_prompt;
        let negative = (guided && !zeros).then(|| {
            let first = request.negative.clone().unwrap_or_default();
            let other = second(&first, &request.negative_2);
            vec![("negative", first), ("negative-2", other)]
        });
        Self {
            positive,
            negative,
            guided,
        }
    }

    /// The ids for the encoder at `place` in the model's list.
    ///
    /// # Errors
    /// [`Error::Request`] when a text cannot be tokenized, or the model has more encoders than a request has prompts.
    pub fn tokenize(&self, place: usize, tokenizer: &Tokenizer) -> Result<Tokenized> {
        let encode = |texts: &[(&'static str, String)]| {
            let (field, text) = texts.get(place).ok_or_else(|| {
                Error::request(
                    "model",
                    format!("has {} text encoders; SDXL has one or two", place + 1),
                )
            })?;
            tokenizer.encode(field, text)
        };
        let negative = self.negative.as_deref().map(encode).transpose()?;
        Ok(Tokenized {
            positive: encode(&self.positive)?,
            negative,
        })
    }

    /// Joins the encoders' outputs to `[branches, tokens, context]` and pooled `[branches, width]`, negative first where
    /// there is one.
    ///
    /// # Errors
    /// [`Error::Contract`] when encoders disagree on the number of tokens, or the pooled one has no projection.
    pub fn join(
        &self,
        model: &Model,
        encoded: &[Embeddings],
    ) -> Result<(Array3<f32>, Array2<f32>)> {
        let fail = |tensor: &str, expected: String, actual: String| Error::Contract {
            graph: "text encoders".into(),
            tensor: tensor.to_owned(),
            expected,
            actual,
        };
        let hidden = encoded.iter().map(|e| e.hidden.view()).collect::<Vec<_>>();
        let hidden = concatenate(Axis(2), &hidden).map_err(|e| {
            fail(
                "hidden_states",
                "as many tokens from every encoder".into(),
                e.to_string(),
            )
        })?;
        let context = model.unet.cross_attention_dim;
        if hidden.dim().2 != context {
            return Err(fail(
                "hidden_states",
                format!("width {context}"),
                format!("width {}", hidden.dim().2),
            ));
        }
        let place = model.text.iter().position(|t| t.pooled);
        let pooled = place.and_then(|p| encoded.get(p)?.pooled.clone());
        let pooled = pooled.ok_or_else(|| {
            fail(
                "text_embeds",
                "a projection".into(),
                "none in the graph".into(),
            )
        })?;
        if pooled.dim().1 != model.unet.pooled_dim {
            let (want, found) = (model.unet.pooled_dim, pooled.dim().1);
            return Err(fail(
                "text_embeds",
                format!("width {want}"),
                format!("width {found}"),
            ));
        }
        if self.guided && self.negative.is_none() {
            let zeros = Array3::zeros((1, hidden.dim().1, hidden.dim().2));
            let zeros_pooled = Array2::zeros((1, pooled.dim().1));
            return Ok((stack(&zeros, &hidden), stack(&zeros_pooled, &pooled)));
        }
        Ok((hidden, pooled))
    }
}

fn stack<D: ndarray::RemoveAxis>(
    first: &ndarray::Array<f32, D>,
    then: &ndarray::Array<f32, D>,
) -> ndarray::Array<f32, D> {
    let mut joined = first.clone();
    // Both have the trailing dimensions of `then`, so this cannot fail.
    let _ = joined.append(Axis(0), then.view());
    joined
}

/// Rows of `time_ids` `[1, ids]`, positive and negative, for the first model of a run or one that `continues` another's
/// latents.
pub fn micro_conditioning(
    request: &Request,
    model: &Model,
    picture: Size,
    continues: bool,
) -> (Array2<f32>, Array2<f32>) {
    let original = request.original_size.unwrap_or(picture);
    let target = request.target_size.unwrap_or(picture);
    let crop = request.crop.unwrap_or_default();
    let (score, negative_score) = AESTHETIC_SCORES;
    if model.requires_aesthetics_score {
        let negative_original = request.negative_original_size.unwrap_or(original);
        let negative_crop = request.negative_crop.unwrap_or_default();
        let positive = scored(original, crop, request.aesthetic_score.unwrap_or(score));
        let negative_score = request.negative_aesthetic_score.unwrap_or(negative_score);
        return (
            positive,
            scored(negative_original, negative_crop, negative_score),
        );
    }
    let positive = sized(original, crop, target);
    if continues {
        // The img2img pipeline's row: either size alone counts, and the crop is the positive one.
        let original = request.negative_original_size.unwrap_or(original);
        let target = request.negative_target_size.unwrap_or(target);
        return (positive, sized(original, crop, target));
    }
    // The text-to-image pipeline has a negative row of its own only when both negative sizes are given.
    let negative = match (request.negative_original_size, request.negative_target_size) {
        (Some(original), Some(target)) => {
            sized(original, request.negative_crop.unwrap_or_default(), target)
        }
        _ => positive.clone(),
    };
    (positive, negative)
}

fn sized(original: Size, crop: Corner, target: Size) -> Array2<f32> {
    row(&[
        original.height,
        original.width,
        crop.top,
        crop.left,
        target.height,
        target.width,
    ]
    .map(|v| v as f32))
}

fn scored(original: Size, crop: Corner, score: f64) -> Array2<f32> {
    row(&[
        original.height as f32,
        original.width as f32,
        crop.top as f32,
        crop.left as f32,
        score as f32,
    ])
}

fn row(values: &[f32]) -> Array2<f32> {
    let mut row = Array2::zeros((1, values.len()));
    row.slice_mut(s![0, ..])
        .assign(&ndarray::ArrayView1::from(values));
    row
}
