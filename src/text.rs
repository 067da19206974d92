//! Prompts to token ids and token ids to embeddings.
//!
//! Twin: `transformers`' `CLIPTokenizer` (fast) and `StableDiffusionXLPipeline.encode_prompt`.

mod chunks;

use std::borrow::Cow;
use std::collections::HashMap;

use ndarray::{Array1, Array2, Axis, Ix2, Ix3};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Backend};

use crate::error::{Error, Result};
use crate::model_file::ModelFile;
use crate::plan::names;
use crate::runtime::Session;
use crate::tensor::Tensor;

pub use chunks::{Chunk, ChunkRule};

/// What CLIP takes as one word: contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Largest tokenizer file. CLIP's have 3 MB at most, those of vocabularies five times as large some 30 MB.
const MAX_BYTES: u64 = 64 << 20;

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

/// What an encoder makes of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Hidden states `[tokens, width]`.
    pub hidden: Array2<f32>,
    /// Pooled and projected `[projection]`, if the encoder has a projection.
    pub pooled: Option<Array1<f32>>,
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
    /// [`Error::Missing`]; [`Error::Weights`] when the files are no BPE vocabulary, or `frame` names ids it does not have.
    pub fn from_vocab(vocab: &ModelFile, merges: &ModelFile, frame: Frame) -> Result<Self> {
        let fail = |reason: String| fault(vocab, reason);
        let tokens = read_vocab(&read(vocab)?).map_err(&fail)?;
        let ranks = read_merges(&read(merges)?).map_err(|reason| fault(merges, reason))?;
        let model = guarded(|| bpe(tokens, ranks, frame.eos)).map_err(&fail)?;
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
    /// [`Error::Missing`]; [`Error::Weights`] when the file is no tokenizer.
    pub fn from_json(json: &ModelFile, frame: Frame) -> Result<Self> {
        let fail = |reason: String| fault(json, reason);
        let bytes = read(json)?;
        let mut backend = guarded(|| Backend::from_bytes(&bytes)).map_err(&fail)?;
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
        let encoding = self.read(field, text)?;
        let room = self.frame.length - 2;
        let content = encoding.get_ids();
        let kept = content.len().min(room);
        let ids = self.framed(content[..kept].iter().map(|id| i64::from(*id)));
        let dropped = encoding
            .get_offsets()
            .get(kept)
            .and_then(|(start, _)| text.get(*start..))
            .map(str::to_owned);
        Ok(Tokens { ids, dropped })
    }

    fn read(&self, field: &'static str, text: &str) -> Result<tokenizers::Encoding> {
        guarded(|| self.backend.encode(text, false))
            .map_err(|reason| Error::request(field, format!("cannot be tokenized: {reason}")))
    }

    /// Content that fits, with start, end and padding.
    fn framed(&self, content: impl Iterator<Item = i64>) -> Vec<i64> {
        let mut ids = Vec::with_capacity(self.frame.length);
        ids.push(self.frame.bos);
        ids.extend(content);
        ids.push(self.frame.eos);
        ids.resize(self.frame.length, self.frame.pad);
        ids
    }
}

fn fault(file: &ModelFile, reason: String) -> Error {
    Error::Weights {
        path: file.path(),
        reason,
    }
}

fn read(file: &ModelFile) -> Result<Cow<'static, [u8]>> {
    let fail = |reason: String| fault(file, reason);
    let opened = file.open("correct the path in the catalogue, or fetch the file", fail)?;
    if opened.len() > MAX_BYTES {
        return Err(fail(format!(
            "has {} bytes; a tokenizer's file has at most {MAX_BYTES}",
            opened.len()
        )));
    }
    opened
        .read(MAX_BYTES)
        .map_err(|e| fail(format!("cannot be read: {e}")))
}

/// `vocab.json`: ids by token. (The tokenizers crate reads both files from paths only.)
fn read_vocab(json: &[u8]) -> Result<Vocab, String> {
    let tokens: HashMap<String, u32> =
        serde_json::from_slice(json).map_err(|e| format!("is not a vocabulary: {e}"))?;
    Ok(tokens.into_iter().collect())
}

/// `merges.txt`: two tokens a line, by rank, below a line with the format's version.
fn read_merges(text: &[u8]) -> Result<Merges, String> {
    let text = str::from_utf8(text).map_err(|e| format!("is not UTF-8: {e}"))?;
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.starts_with("#version"))
        .map(|(at, line)| match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
            _ => Err(format!(
                "line {}: two tokens with a space between them are expected",
                at + 1
            )),
        })
        .collect()
}

/// The byte-pair model; what it cannot read becomes the end mark, as in CLIP.
fn bpe(tokens: Vocab, ranks: Merges, eos: i64) -> tokenizers::Result<BPE> {
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

/// Runs a text encoder over one sequence: what a text means does not depend on what else is encoded beside it.
///
/// # Errors
/// Those of [`Session::run`]; [`Error::Contract`] when outputs have another rank; [`Error::NonFinite`].
pub fn embed(session: &mut Session, component: &str, ids: &[i64]) -> Result<Embedding> {
    let contract = |tensor: &str, reason: String| Error::Contract {
        graph: component.to_owned(),
        tensor: tensor.to_owned(),
        expected: "rank as exported, one row a sequence".into(),
        actual: reason,
    };
    let ids = Array1::from(ids.to_vec()).insert_axis(Axis(0));
    let mut outputs = session.run(&[(names::INPUT_IDS, &Tensor::from(ids))])?;
    let mut take = |name: &str| match outputs.remove(name) {
        Some(Tensor::F32(array)) if array.shape().first() == Some(&1) => Some(array),
        _ => None,
    };
    let hidden = take(names::HIDDEN_STATES)
        .ok_or_else(|| contract(names::HIDDEN_STATES, "not an output".into()))?;
    let hidden = hidden
        .into_dimensionality::<Ix3>()
        .map_err(|e| contract(names::HIDDEN_STATES, e.to_string()))?
        .remove_axis(Axis(0));
    let pooled = take(names::TEXT_EMBEDS)
        .map(|p| {
            p.into_dimensionality::<Ix2>()
                .map(|p| p.remove_axis(Axis(0)))
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
    Ok(Embedding { hidden, pooled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_as_the_tokenizers_crate_reads_them() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/tokenizer");
        let paths = ["vocab.json", "merges.txt"].map(|name| root.join(name));
        let [vocab, merges] = paths.clone().map(|path| std::fs::read(path).unwrap());
        let [vocab_path, merges_path] = paths.map(|path| path.to_str().unwrap().to_owned());
        let (tokens, ranks) = BPE::read_file(&vocab_path, &merges_path).unwrap();
        assert!(tokens.len() > 700 && !ranks.is_empty());
        assert_eq!(read_vocab(&vocab).unwrap(), tokens);
        assert_eq!(read_merges(&merges).unwrap(), ranks);
    }

    #[test]
    fn damaged_files_are_refused_with_their_place() {
        for (text, place) in [
            ("#version: 0.2\na b\nab\n", "line 3"),
            ("a b c\n", "line 1"),
            ("a b\n\n", "line 2"),
        ] {
            assert!(read_merges(text.as_bytes()).unwrap_err().contains(place));
        }
        assert!(read_merges(b"a \xff\n").unwrap_err().contains("UTF-8"));
        for json in [r#"{"a": -1}"#, r#"{"a": "b"}"#, "[]", "", "{"] {
            let reason = read_vocab(json.as_bytes()).unwrap_err();
            assert!(reason.contains("not a vocabulary"), "{reason}");
        }
    }
}
