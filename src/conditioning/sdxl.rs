//! SDXL's prompts and micro-conditioning, for base and refiner alike.
//!
//! Twin: `encode_prompt` and `_get_add_time_ids` of diffusers' `StableDiffusionXLPipeline` and, for models with an
//! aesthetic score, `StableDiffusionXLImg2ImgPipeline`.

use ndarray::{Array1, Array2, Axis, concatenate, s, stack};

use crate::error::{Error, Result};
use crate::manifest::Model;
use crate::prompt::{Piece, Scheduled, passages};
use crate::request::{Corner, LongPrompts, PromptSyntax, Request, Size};
use crate::text::{Chunk, ChunkRule, Embedding, Tokenizer};

/// diffusers' default `aesthetic_score` and `negative_aesthetic_score`.
const AESTHETIC_SCORES: (f64, f64) = (6.0, 2.5);

/// The texts of a request over its steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompts {
    positive: Fields<Scheduled>,
    /// `None` where the negative branch is zeros.
    negative: Option<Fields<Scheduled>>,
    syntax: PromptSyntax,
    long: LongPrompts,
}

/// One value for each encoder, with the request's field that it comes from: the first reads `prompt`, the second
/// `prompt-2`.
type Fields<T> = [(&'static str, T); 2];

/// What one branch of guidance is told at one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Nothing: zeros in place of embeddings.
    Zeros,
    /// A text for each encoder.
    Texts {
        /// Whether it is the negative branch.
        negative: bool,
        /// The texts, with weights and escapes in them, and the request's fields that they come from.
        texts: Fields<String>,
    },
}

/// A text as one encoder reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The request's field that it comes from.
    pub field: &'static str,
    /// Its sequences, at least one.
    pub chunks: Vec<Chunk>,
    /// A sequence without content.
    pub empty: Chunk,
    /// The end that did not fit, in the user's own letters.
    pub dropped: Option<String>,
}

/// A text as the UNet is told it.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// Embeddings `[tokens, context]`.
    pub hidden: Array2<f32>,
    /// Pooled embedding `[width]`.
    pub pooled: Array1<f32>,
}

impl Prompts {
    /// The texts that `model` reads. A request without any negative prompt means zeros for models with
    /// `force_zeros_for_empty_prompt`, and the encoded empty text for the others.
    ///
    /// # Errors
    /// [`Error::Request`] for schedules nested too deep.
    pub fn new(request: &Request, model: &Model) -> Result<Self> {
        let syntax = request.prompt_syntax.unwrap_or_default();
        let scheduled = |field, text: &str| -> Result<(&'static str, Scheduled)> {
            Ok(match syntax {
                PromptSyntax::Plain => (field, Scheduled::plain(text)),
                PromptSyntax::A1111 => (field, Scheduled::parse(field, text)?),
            })
        };
        // Like diffusers' `prompt_2 or prompt`: an empty second prompt is no second prompt.
        let fields = |[first, second]: [&'static str; 2], text: &str, other: &Option<String>| {
            let other = other.as_deref().filter(|text| !text.is_empty());
            Ok([
                scheduled(first, text)?,
                match other {
                    Some(other) => scheduled(second, other)?,
                    None => scheduled(first, text)?,
                },
            ])
        };
        let positive = fields(["prompt", "prompt-2"], &request.prompt, &request.prompt_2)?;
        // diffusers looks at `negative_prompt` only: `negative_prompt_2` alone does not prevent the zeros.
        let zeros = request.negative.is_none() && model.force_zeros_for_empty_prompt;
        let negative = (!zeros).then(|| {
            let text = request.negative.as_deref().unwrap_or_default();
            fields(["negative", "negative-2"], text, &request.negative_2)
        });
        Ok(Self {
            positive,
            negative: negative.transpose()?,
            syntax,
            long: request.long_prompts.unwrap_or_default(),
        })
    }

    /// What the positive branch is told at a zero-based step of `steps`.
    pub fn positive(&self, step: usize, steps: usize) -> Told {
        let texts = self.positive.each_ref();
        Told::Texts {
            negative: false,
            texts: texts.map(|(field, text)| (*field, text.at(step, steps))),
        }
    }

    /// What the negative branch is told at a zero-based step of `steps`.
    pub fn negative(&self, step: usize, steps: usize) -> Told {
        self.negative.as_ref().map_or(Told::Zeros, |texts| {
            let texts = texts.each_ref();
            Told::Texts {
                negative: true,
                texts: texts.map(|(field, text)| (*field, text.at(step, steps))),
            }
        })
    }

    /// How the encoder at `place` in the model's list reads what a branch is told; zeros are not read.
    ///
    /// # Errors
    /// [`Error::Request`] when a text cannot be read, or the model has more encoders than a request has prompts.
    pub fn read(
        &self,
        told: &Told,
        place: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Reading>> {
        let Told::Texts { texts, .. } = told else {
            return Ok(None);
        };
        let (field, text) = texts.get(place).ok_or_else(|| {
            let reason = format!("has {} text encoders; SDXL has one or two", place + 1);
            Error::request("model", reason)
        })?;
        let (passages, rule) = match self.syntax {
            PromptSyntax::Plain if self.long == LongPrompts::Cut => {
                let tokens = tokenizer.encode(field, text)?;
                let weights = vec![1.0; tokens.ids.len()];
                let ids = tokens.ids;
                return Ok(Some(Reading {
                    field,
                    chunks: vec![Chunk { ids, weights }],
                    empty: tokenizer.empty_chunk(),
                    dropped: tokens.dropped,
                }));
            }
            PromptSyntax::Plain => {
                let (text, weight) = (text.clone(), 1.0);
                (vec![vec![Piece { text, weight }]], ChunkRule::Full)
            }
            PromptSyntax::A1111 => (passages(field, text)?, ChunkRule::Comma),
        };
        Ok(Some(Reading {
            field,
            chunks: tokenizer.chunks(field, &passages, rule)?,
            empty: tokenizer.empty_chunk(),
            dropped: None,
        }))
    }
}

impl Reading {
    /// Its chunks, filled up to `count` with empty ones.
    pub fn filled(&self, count: usize) -> impl Iterator<Item = &Chunk> {
        let missing = count.saturating_sub(self.chunks.len());
        self.chunks
            .iter()
            .chain(std::iter::repeat_n(&self.empty, missing))
    }
}

impl Encoded {
    /// Zeros for as many tokens.
    pub fn zeros(model: &Model, tokens: usize) -> Self {
        Self {
            hidden: Array2::zeros((tokens, model.unet.cross_attention_dim)),
            pooled: Array1::zeros(model.unet.pooled_dim),
        }
    }

    /// Joins what the encoders made of one text: for each the embeddings of its chunks, weighed. The pooled embedding is
    /// that of the first chunk.
    ///
    /// # Errors
    /// [`Error::Contract`] when encoders disagree on the number of tokens, or the pooled one has no projection.
    pub fn join(model: &Model, encoders: &[Vec<Embedding>]) -> Result<Self> {
        let fail = |tensor: &str, expected: String, actual: String| Error::Contract {
            graph: "text encoders".into(),
            tensor: tensor.to_owned(),
            expected,
            actual,
        };
        let misfit = |e: ndarray::ShapeError| {
            let wanted = "as many tokens from every encoder".to_owned();
            fail("hidden_states", wanted, e.to_string())
        };
        let of_encoder = |chunks: &Vec<Embedding>| {
            let hidden = chunks.iter().map(|e| e.hidden.view()).collect::<Vec<_>>();
            stack(Axis(0), &hidden).map_err(misfit)
        };
        let hidden = encoders
            .iter()
            .map(of_encoder)
            .collect::<Result<Vec<_>>>()?;
        let hidden = hidden.iter().map(|h| h.view()).collect::<Vec<_>>();
        let hidden = concatenate(Axis(2), &hidden).map_err(misfit)?;
        let (chunks, tokens, width) = hidden.dim();
        let context = model.unet.cross_attention_dim;
        if width != context {
            let (want, found) = (format!("width {context}"), format!("width {width}"));
            return Err(fail("hidden_states", want, found));
        }
        // Joining along the last axis leaves another layout than row by row.
        let hidden = hidden.as_standard_layout().into_owned();
        let hidden = hidden
            .into_shape_with_order((chunks * tokens, width))
            .map_err(misfit)?;
        let place = model.text.iter().position(|t| t.pooled);
        let pooled = place.and_then(|p| encoders.get(p)?.first()?.pooled.clone());
        let pooled = pooled.ok_or_else(|| {
            let missing = "none in the graph".to_owned();
            fail("text_embeds", "a projection".into(), missing)
        })?;
        if pooled.len() != model.unet.pooled_dim {
            let (want, found) = (model.unet.pooled_dim, pooled.len());
            let (want, found) = (format!("width {want}"), format!("width {found}"));
            return Err(fail("text_embeds", want, found));
        }
        Ok(Self { hidden, pooled })
    }
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
