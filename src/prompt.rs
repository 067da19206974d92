//! Prompts as text: what rules at which step, and how much each part of it weighs.
//!
//! Python twin: `modules/prompt_parser.py` of AUTOMATIC1111's web UI, whose syntax it is:
//!
//! | written | means |
//! |---|---|
//! | `(a)`, `[a]` | `a` weighs 1.1 times as much, or 1/1.1 times; brackets multiply |
//! | `(a:1.3)` | `a` weighs 1.3 times as much |
//! | `\(`, `\)`, `\[`, `\]`, `\\` | the character itself |
//! | `BREAK` | what follows begins a new chunk of tokens |
//! | `[a:b:0.4]`, `[a:b:8]` | `a` for 40 % of the steps, or for 8 steps, then `b`; `[b:8]` begins with nothing |
//! | `[a\|b]` | `a` and `b` in turns, step by step |
//!
//! What does not follow the syntax is read as it stands, as there. The exceptions: `BREAK` inside brackets is a break
//! too, a number with two points is text, and a `|` outside brackets does not turn scheduling off.

mod schedule;
mod weights;

pub use schedule::Scheduled;
pub use weights::{Piece, passages};
