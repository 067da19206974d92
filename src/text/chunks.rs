//! Prompts of any length: chunks of as many tokens as an encoder reads at once, each with start and end of its own.
//!
//! Python twin: `tokenize_line` in `modules/sd_hijack_clip.py` of AUTOMATIC1111's web UI.

use ndarray::Array2;

use super::Tokenizer;
use crate::error::{Error, Result};
use crate::prompt::Piece;

/// More than this is no prompt: keys and values of one chunk take 50 MB in SDXL.
const MAX_CHUNKS: usize = 32;

/// One sequence for an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Start, content, end, padding.
    pub ids: Vec<i64>,
    /// How much each of them weighs.
    pub weights: Vec<f32>,
}

/// Where a chunk may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkRule {
    /// Where it is full.
    Full,
    /// After a comma among its last tokens, if there is one: as the web UI's `comma_padding_backtrack`, 20.
    Comma,
}

/// Tokens among which a comma is looked for.
const BACKTRACK: usize = 20;

/// Chunks in the making.
struct Filling<'a> {
    tokenizer: &'a Tokenizer,
    room: usize,
    done: Vec<Chunk>,
    open: Vec<(i64, f32)>,
    /// Place of the latest comma in the open chunk.
    comma: Option<usize>,
}

impl Tokenizer {
    /// The chunks of a prompt, at least one.
    ///
    /// # Errors
    /// [`Error::Request`] when the tokenizer cannot read a text, or it is far too long.
    pub fn chunks(
        &self,
        field: &'static str,
        passages: &[Vec<Piece>],
        rule: ChunkRule,
    ) -> Result<Vec<Chunk>> {
        let comma = match rule {
            ChunkRule::Full => None,
            ChunkRule::Comma => self.backend.token_to_id(",</w>").map(i64::from),
        };
        let mut filling = Filling {
            tokenizer: self,
            room: self.frame.length - 2,
            done: Vec::new(),
            open: Vec::new(),
            comma: None,
        };
        for (i, passage) in passages.iter().enumerate() {
            if i > 0 {
                filling.close();
            }
            for piece in passage {
                for id in self.read(field, &piece.text)?.get_ids() {
                    filling.add(i64::from(*id), piece.weight, comma);
                }
            }
        }
        if !filling.open.is_empty() || filling.done.is_empty() {
            filling.close();
        }
        if filling.done.len() > MAX_CHUNKS {
            let (found, room) = (filling.done.len(), filling.room);
            let reason = format!("needs {found} chunks of {room} tokens; at most {MAX_CHUNKS}");
            return Err(Error::request(field, reason));
        }
        Ok(filling.done)
    }

    /// A chunk without content, which fills up shorter prompts.
    pub fn empty_chunk(&self) -> Chunk {
        self.chunk(&[])
    }

    fn chunk(&self, content: &[(i64, f32)]) -> Chunk {
        let mut weights = vec![1.0; self.frame.length];
        for (weight, (_, of)) in weights[1..].iter_mut().zip(content) {
            *weight = *of;
        }
        Chunk {
            ids: self.framed(content.iter().map(|(id, _)| *id)),
            weights,
        }
    }
}

impl Filling<'_> {
    fn add(&mut self, id: i64, weight: f32, comma: Option<i64>) {
        let full = self.open.len() == self.room;
        if comma == Some(id) {
            self.comma = Some(self.open.len());
        } else if full
            && let Some(at) = self.comma
            && self.open.len() - at <= BACKTRACK
        {
            let moved = self.open.split_off(at + 1);
            self.close();
            self.open = moved;
        }
        if self.open.len() == self.room {
            self.close();
        }
        self.open.push((id, weight));
    }

    fn close(&mut self) {
        self.done.push(self.tokenizer.chunk(&self.open));
        self.open.clear();
        self.comma = None;
    }
}

impl Chunk {
    /// Weighs hidden states `[tokens, width]` of this chunk and restores their mean, which the weights would shift.
    ///
    /// Source: the web UI's emphasis "Original". It takes the mean over all texts that are encoded in one batch, such as
    /// the steps of a scheduled prompt; here a text is weighed by itself.
    ///
    /// # Errors
    /// [`Error::Request`] when nothing is left to restore the mean of.
    pub fn weigh(&self, field: &'static str, hidden: &mut Array2<f32>) -> Result<()> {
        if self
            .weights
            .iter()
            .all(|w| w.to_bits() == 1.0_f32.to_bits())
        {
            return Ok(());
        }
        let sum = |a: &Array2<f32>| a.iter().map(|v| f64::from(*v)).sum::<f64>();
        let before = sum(hidden);
        for (mut row, weight) in hidden.rows_mut().into_iter().zip(&self.weights) {
            row.mapv_inplace(|v| v * weight);
        }
        let ratio = (before / sum(hidden)) as f32;
        if !ratio.is_finite() {
            let reason = "its weights cancel each other; use weights nearer to 1";
            return Err(Error::request(field, reason));
        }
        hidden.mapv_inplace(|v| v * ratio);
        Ok(())
    }
}
