//! `(a:1.3)`, `[a]`, escapes and `BREAK`: pieces of text with their weights.

use crate::error::{Error, Result};

/// What round brackets without a number multiply with; square ones divide.
const STEP: f64 = 1.1;
const BREAK: &str = "BREAK";
const SPECIAL: [char; 6] = ['\\', '(', ')', '[', ']', ':'];

/// A piece of a prompt with one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The text, without brackets and escapes.
    pub text: String,
    /// How much it weighs; finite.
    pub weight: f32,
}

/// Text, or `None` for a break, and its weight.
type Item = (Option<String>, f64);

/// The passages of a prompt between `BREAK`s, at least one; each the pieces of it, of which no two neighbours weigh the
/// same and none is empty.
///
/// # Errors
/// [`Error::Request`] that names `field`, for weights that f32 cannot hold.
pub fn passages(field: &'static str, text: &str) -> Result<Vec<Vec<Piece>>> {
    let mut passages = vec![Vec::<Piece>::new()];
    for (text, weight) in items(text) {
        let Some(text) = text else {
            passages.push(Vec::new());
            continue;
        };
        let weight = weight as f32;
        if !weight.is_finite() {
            let reason = format!("the weight of {text:?} is not finite; use fewer brackets");
            return Err(Error::request(field, reason));
        }
        let Some(passage) = passages.last_mut() else {
            continue;
        };
        match passage.last_mut() {
            Some(last) if last.weight.to_bits() == weight.to_bits() => last.text.push_str(&text),
            _ if text.is_empty() => {}
            _ => passage.push(Piece { text, weight }),
        }
    }
    Ok(passages)
}

fn items(text: &str) -> Vec<Item> {
    let mut items = Vec::<Item>::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |items: &mut Vec<Item>, from: usize, factor: f64| {
        items[from..].iter_mut().for_each(|(_, w)| *w *= factor);
    };
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let mut used = first.len_utf8();
        match first {
            '\\' => {
                let next = rest[1..].chars().next();
                let escaped = next.filter(|c| SPECIAL.contains(c) && *c != ':');
                used += escaped.map_or(0, char::len_utf8);
                items.push((Some(escaped.map(String::from).unwrap_or_default()), 1.0));
            }
            '(' => round.push(items.len()),
            '[' => square.push(items.len()),
            ')' | ':' if !round.is_empty() => {
                let (factor, length) = if first == ')' {
                    (Some(STEP), 1)
                } else {
                    weight_mark(rest).map_or((None, 1), |(w, n)| (Some(w), n))
                };
                used = length;
                match factor.and_then(|factor| Some((round.pop()?, factor))) {
                    Some((from, factor)) => multiply(&mut items, from, factor),
                    None => items.push((Some(":".to_owned()), 1.0)),
                }
            }
            ']' if !square.is_empty() => {
                let from = square.pop().unwrap_or_default();
                multiply(&mut items, from, 1.0 / STEP);
            }
            _ => {
                used += rest[used..].find(SPECIAL).unwrap_or(rest.len() - used);
                split_breaks(&rest[..used], &mut items);
            }
        }
        rest = &rest[used..];
    }
    for from in round {
        multiply(&mut items, from, STEP);
    }
    for from in square {
        multiply(&mut items, from, 1.0 / STEP);
    }
    items
}

/// The number of `:1.3)` at the start of a text, and the bytes that it takes.
fn weight_mark(text: &str) -> Option<(f64, usize)> {
    let (inside, _) = text.strip_prefix(':')?.split_once(')')?;
    let number = inside.trim();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    if digits.is_empty() || !digits.chars().all(|c| c == '.' || c.is_ascii_digit()) {
        return None;
    }
    Some((number.parse().ok()?, inside.len() + 2))
}

/// Text and the breaks in it. A break is a word of its own and takes the spaces around it with it.
fn split_breaks(text: &str, items: &mut Vec<Item>) {
    let in_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let (mut from, mut search) = (0, 0);
    while let Some(found) = text[search..].find(BREAK) {
        let (start, end) = (search + found, search + found + BREAK.len());
        search = end;
        if in_word(text[..start].chars().next_back()) || in_word(text[end..].chars().next()) {
            continue;
        }
        items.push((Some(text[from..start].trim_end().to_owned()), 1.0));
        items.push((None, 1.0));
        from = end + text[end..].len() - text[end..].trim_start().len();
        search = from;
    }
    items.push((Some(text[from..].to_owned()), 1.0));
}
