//! Prompts to token ids and token ids to embeddings.
//!
//! Twin: `transformers`' `CLIPTokenizer` (fast) and `StableDiffusionXLPipeline.encode_prompt`.

use std::path::Path;

use ndarray::{Array2, Array3, Ix2, Ix3};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Backend};

use crate::error::{Error, Result};
use crate::plan::names;
use crate::runtime::Session;
use crate::tensor::Tensor;

/// What CLIP takes as one word: contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Ids that frame a sequence, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Start of text.
    pub bos: i64,
    /// End of text.
    pub eos: i64,
    /// Fills up to `length`.
    pub pad: i64,
    /// Tokens in all.
    pub length: usize,
}

/// A CLIP tokenizer.
pub struct Tokenizer {
    backend: Backend,
    frame: Frame,
}

/// A prompt as one encoder reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Exactly [`Frame::length`] ids: start, content, end, padding.
    pub ids: Vec<i64>,
    /// The end of the prompt that did not fit, in the user's own letters.
    pub dropped: Option<String>,
}

/// Text embeddings of one or several prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// Penultimate hidden states `[batch, tokens, width]`.
    pub hidden: Array3<f32>,
    /// Pooled and projected `[batch, projection]`, if the encoder has a projection.
    pub pooled: Option<Array2<f32>>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("frame", &self.frame)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// A tokenizer from the hub's `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// [`Error::Weights`] when the files are no BPE vocabulary, or `frame` names ids it does not have.
    pub fn from_vocab(vocab: &Path, merges: &Path, frame: Frame) -> Result<Self> {
        let fail = |reason: String| Error::Weights {
            path: vocab.to_owned(),
            reason,
        };
        let (Some(vocab_name), Some(merges_name)) = (vocab.to_str(), merges.to_str()) else {
            return Err(fail("tokenizer files need a UTF-8 path".into()));
        };
        let model = guarded(|| bpe(vocab_name, merges_name, frame.eos)).map_err(&fail)?;
        let mut backend = Backend::new(model);
        guarded(|| read_as_clip(&mut backend)).map_err(&fail)?;
        // transformers makes the padding token special too, so a `!` in the prompt is SDXL's second padding id.
        let mut specials = Vec::new();
        for id in [frame.bos, frame.eos, frame.pad] {
            let token = u32::try_from(id)
                .ok()
                .and_then(|id| backend.id_to_token(id));
            let absent = || {
                fail(format!(
                    "has no token with id {id}, which models.yaml names"
                ))
            };
            specials.push(AddedToken::from(token.ok_or_else(absent)?, true));
        }
        backend
            .add_special_tokens(specials)
            .map_err(|e| fail(e.to_string()))?;
        Ok(Self { backend, frame })
    }

    /// A tokenizer from a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Weights`] when the file is no tokenizer.
    pub fn from_json(json: &Path, frame: Frame) -> Result<Self> {
        let fail = |reason: String| Error::Weights {
            path: json.to_owned(),
            reason,
        };
        let mut backend = guarded(|| Backend::from_file(json)).map_err(&fail)?;
        backend.with_padding(None);
        backend
            .with_truncation(None)
            .map_err(|e| fail(e.to_string()))?;
        Ok(Self { backend, frame })
    }

    /// Ids of `text` with start, end and padding. What does not fit is cut off, never the end mark.
    ///
    /// # Errors
    /// [`Error::Request`] when the tokenizer cannot read the text.
    pub fn encode(&self, field: &'static str, text: &str) -> Result<Tokens> {
        let fail = |reason: String| Error::request(field, format!("cannot be tokenized: {reason}"));
        let encoding = guarded(|| self.backend.encode(text, false)).map_err(fail)?;
        let room = self.frame.length - 2;
        let content = encoding.get_ids();
        let kept = content.len().min(room);
        let mut ids = Vec::with_capacity(self.frame.length);
        ids.push(self.frame.bos);
        ids.extend(content[..kept].iter().map(|id| i64::from(*id)));
        ids.push(self.frame.eos);
        ids.resize(self.frame.length, self.frame.pad);
        let dropped = encoding
            .get_offsets()
            .get(kept)
            .and_then(|(start, _)| text.get(*start..))
            .map(str::to_owned);
        Ok(Tokens { ids, dropped })
    }
}

/// The byte-pair model; what it cannot read becomes the end mark, as in CLIP.
fn bpe(vocab: &str, merges: &str, eos: i64) -> tokenizers::Result<BPE> {
    let (tokens, ranks) = BPE::read_file(vocab, merges)?;
    let end = tokens.iter().find(|(_, id)| i64::from(**id) == eos);
    let end = end
        .map(|(token, _)| token.clone())
        .ok_or("eos is not in the vocabulary")?;
    let builder = BPE::builder().vocab_and_merges(tokens, ranks);
    builder
        .end_of_word_suffix("</w>".into())
        .unk_token(end)
        .build()
}

/// CLIP's way from text to words: NFC, single spaces, lower case; then [`WORDS`] in the byte alphabet.
fn read_as_clip(backend: &mut Backend) -> tokenizers::Result<()> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    let normalizers = vec![NFC.into(), spaces.into(), Lowercase.into()];
    backend.with_normalizer(Some(Normalizers::new(normalizers)))?;
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )?;
    let bytes = ByteLevel::new(false, true, true);
    backend.with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), bytes.into()])));
    Ok(())
}

/// Runs `work` of the tokenizers crate, whose code panics on some malformed files.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer library failed on it".into()),
    }
}

/// Runs a text encoder over sequences of equal length.
///
/// # Errors
/// Those of [`Session::run`]; [`Error::Contract`] when outputs have another rank; [`Error::NonFinite`].
pub fn embed(session: &mut Session, component: &str, sequences: &[&Tokens]) -> Result<Embeddings> {
    let length = sequences.first().map_or(0, |t| t.ids.len());
    let flat = sequences
        .iter()
        .flat_map(|t| t.ids.iter().copied())
        .collect::<Vec<_>>();
    let contract = |tensor: &str, reason: String| Error::Contract {
        graph: component.to_owned(),
        tensor: tensor.to_owned(),
        expected: "rank as exported".into(),
        actual: reason,
    };
    let ids = Array2::from_shape_vec((sequences.len(), length), flat)
        .map_err(|e| contract(names::INPUT_IDS, e.to_string()))?;
    let mut outputs = session.run(&[(names::INPUT_IDS, &Tensor::from(ids))])?;
    let mut take = |name: &str| match outputs.remove(name) {
        Some(Tensor::F32(array)) => Some(array),
        _ => None,
    };
    let hidden = take(names::HIDDEN_STATES)
        .ok_or_else(|| contract(names::HIDDEN_STATES, "not an output".into()))?;
    let hidden = hidden
        .into_dimensionality::<Ix3>()
        .map_err(|e| contract(names::HIDDEN_STATES, e.to_string()))?;
    let pooled = take(names::TEXT_EMBEDS)
        .map(|p| {
            p.into_dimensionality::<Ix2>()
                .map_err(|e| contract(names::TEXT_EMBEDS, e.to_string()))
        })
        .transpose()?;
    let finite = crate::tensor::all_finite(&hidden) && pooled.iter().all(crate::tensor::all_finite);
    if !finite {
        return Err(Error::NonFinite {
            component: component.to_owned(),
            step: None,
            remedy: "the checkpoint's text encoder is broken or overflows; check the weight file",
        });
    }
    Ok(Embeddings { hidden, pooled })
}
