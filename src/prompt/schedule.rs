//! `[a:b:0.4]` and `[a|b]`: one text a step.

use std::ops::Range;

use crate::error::{Error, Result};

/// Deeper nesting is no prompt, and would need a deep stack.
const MAX_DEPTH: usize = 32;

/// A prompt that may change from step to step.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheduled(Vec<Part>);

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    /// One text, then another.
    Switch {
        before: Vec<Part>,
        after: Vec<Part>,
        when: When,
    },
    /// Texts in turns.
    Turns(Vec<Vec<Part>>),
}

/// The last step of the first text.
#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    /// After so many steps.
    Steps(f64),
    /// After a share of all steps: what is written with a decimal point.
    Share(f64),
}

impl Scheduled {
    /// A text that never changes.
    pub fn plain(text: &str) -> Self {
        Self(vec![Part::Text(text.to_owned())])
    }

    /// Reads the schedule in a prompt.
    ///
    /// # Errors
    /// [`Error::Request`] that names `field`, for schedules nested too deep.
    pub fn parse(field: &'static str, text: &str) -> Result<Self> {
        let scanner = Scanner {
            field,
            text,
            partner: partners(text.as_bytes()),
        };
        scanner.parts(0..text.len(), 0).map(Self)
    }

    /// The text at a zero-based step of `steps`; weights and escapes are still in it.
    pub fn at(&self, step: usize, steps: usize) -> String {
        let mut text = String::new();
        write(&self.0, step, steps, &mut text);
        text
    }
}

fn write(parts: &[Part], step: usize, steps: usize, to: &mut String) {
    for part in parts {
        match part {
            Part::Text(text) => to.push_str(text),
            Part::Switch {
                before,
                after,
                when,
            } => {
                let last = match when {
                    When::Steps(count) => *count,
                    When::Share(share) => share * steps as f64,
                };
                // As there: the number is cut off, and steps count from 1.
                let first = (step + 1) as f64 <= last.trunc();
                write(if first { before } else { after }, step, steps, to);
            }
            Part::Turns(turns) => {
                if let Some(turn) = turns.get(step % turns.len().max(1)) {
                    write(turn, step, steps, to);
                }
            }
        }
    }
}

/// For every opening bracket its closing one, for everything else 0. Round and square ones are matched by themselves.
fn partners(bytes: &[u8]) -> Vec<usize> {
    let mut partner = vec![0; bytes.len()];
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < bytes.len() {
        let stack = match bytes[at] {
            b'(' | b')' => &mut round,
            _ => &mut square,
        };
        match bytes[at] {
            b'\\' => at += 1,
            b'(' | b'[' => stack.push(at),
            b')' | b']' => {
                if let Some(open) = stack.pop() {
                    partner[open] = at;
                }
            }
            _ => {}
        }
        at += 1;
    }
    partner
}

struct Scanner<'a> {
    field: &'static str,
    text: &'a str,
    partner: Vec<usize>,
}

impl Scanner<'_> {
    fn parts(&self, span: Range<usize>, depth: usize) -> Result<Vec<Part>> {
        if depth > MAX_DEPTH {
            let reason = format!("has schedules nested more than {MAX_DEPTH} deep");
            return Err(Error::request(self.field, reason));
        }
        let bytes = self.text.as_bytes();
        let (mut parts, mut from, mut at) = (Vec::new(), span.start, span.start);
        while at < span.end {
            match bytes[at] {
                b'\\' => at += 2,
                b'[' if self.closes(at, span.end) => {
                    let close = self.partner[at];
                    if let Some(part) = self.bracket(at + 1..close, depth)? {
                        parts.push(Part::Text(self.text[from..at].to_owned()));
                        parts.push(part);
                        (from, at) = (close + 1, close + 1);
                    } else {
                        at += 1;
                    }
                }
                _ => at += 1,
            }
        }
        parts.push(Part::Text(self.text[from..span.end].to_owned()));
        Ok(parts)
    }

    /// What is between square brackets, unless that is no schedule.
    fn bracket(&self, span: Range<usize>, depth: usize) -> Result<Option<Part>> {
        let separators = self.separators(span.clone());
        let colons = separators.iter().filter(|(_, c)| *c == b':').count();
        let turns = separators.len() - colons;
        let cuts = separators.iter().map(|(at, _)| *at);
        let starts = [span.start]
            .into_iter()
            .chain(cuts.clone().map(|at| at + 1));
        let spans = starts.zip(cuts.chain([span.end])).map(|(a, b)| a..b);
        let spans = spans.collect::<Vec<_>>();
        let parts = |span: &Range<usize>| self.parts(span.clone(), depth + 1);
        if turns > 0 && colons == 0 {
            let turns = spans.iter().map(parts).collect::<Result<Vec<_>>>()?;
            return Ok(Some(Part::Turns(turns)));
        }
        let (before, after, when) = match &spans[..] {
            [after, when] if turns == 0 => (None, after, when),
            [before, after, when] if turns == 0 => (Some(before), after, when),
            _ => return Ok(None),
        };
        let Some(when) = moment(self.text[when.clone()].trim()) else {
            return Ok(None);
        };
        Ok(Some(Part::Switch {
            before: before.map_or(Ok(Vec::new()), parts)?,
            after: parts(after)?,
            when,
        }))
    }

    /// The colons and bars of a span that are in no brackets of their own.
    fn separators(&self, span: Range<usize>) -> Vec<(usize, u8)> {
        let bytes = self.text.as_bytes();
        let (mut found, mut at) = (Vec::new(), span.start);
        while at < span.end {
            match bytes[at] {
                b'\\' => at += 1,
                b'(' | b'[' if self.closes(at, span.end) => at = self.partner[at],
                c @ (b':' | b'|') => found.push((at, c)),
                _ => {}
            }
            at += 1;
        }
        found
    }

    /// Whether the bracket at a place is closed before `end`.
    fn closes(&self, at: usize, end: usize) -> bool {
        (1..end).contains(&self.partner[at])
    }
}

fn moment(text: &str) -> Option<When> {
    let numeric = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
    if !text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c))
        || !text.chars().all(numeric)
    {
        return None;
    }
    let number = text.parse().ok()?;
    Some(if text.contains('.') {
        When::Share(number)
    } else {
        When::Steps(number)
    })
}
