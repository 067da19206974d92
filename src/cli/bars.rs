//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

use super::console::say;
use crate::progress::{Control, Event, Stage};

/// Shows the events of one run.
pub(super) struct Bars {
    terminal: bool,
    bar: Option<ProgressBar>,
    counting: Option<Counting>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Counting {
    Bytes,
    Steps,
}

impl Bars {
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            bar: None,
            counting: None,
        }
    }

    /// Shows an event; never asks to stop.
    pub fn show(&mut self, event: &Event<'_>) -> Control {
        match event {
            Event::Stage { stage, what } => self.stage(*stage, what),
            Event::Download {
                file: what,
                done,
                total,
            }
            | Event::Expansion { what, done, total } => {
                self.count(Counting::Bytes, what, *done, *total);
            }
            Event::Step { done, total, .. } => {
                self.count(Counting::Steps, "steps", *done as u64, *total as u64);
            }
            Event::Note(text) => self.line(text),
            Event::Warning(text) => self.line(&format!("warning: {text}")),
            Event::ModelOutput { .. } => {}
        }
        Control::Continue
    }

    /// Takes the bars away.
    pub fn clear(&mut self) {
        self.counting = None;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn stage(&mut self, stage: Stage, what: &str) {
        let verb = match stage {
            Stage::Download => "downloading",
            Stage::Load => "loading",
            Stage::Expand => "expanding",
            Stage::Merge => "merging",
            Stage::Text => "encoding with",
            Stage::Image => "looking with",
            Stage::Denoise => "denoising with",
            Stage::Decode => "decoding with",
            Stage::Write => "writing",
        };
        if !self.terminal {
            return self.line(&format!("{verb} {what}"));
        }
        self.clear();
        let spinner = ProgressBar::new_spinner().with_message(format!("{verb} {what}"));
        spinner.enable_steady_tick(std::time::Duration::from_millis(120));
        self.bar = Some(spinner);
    }

    fn count(&mut self, what: Counting, name: &str, done: u64, total: u64) {
        if !self.terminal {
            if what == Counting::Steps {
                self.line(&format!("step {done}/{total}"));
            }
            return;
        }
        if self.counting != Some(what) {
            self.clear();
            let template = match what {
                Counting::Bytes => "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                Counting::Steps => "{msg} {bar:40} {pos}/{len} {per_sec} {eta}",
            };
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar = Some(
                ProgressBar::new(total)
                    .with_style(style)
                    .with_message(name.to_owned()),
            );
            self.counting = Some(what);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }
}
