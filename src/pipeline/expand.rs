//! Whether a network's weights are expanded on disk, and what the caller hears of it.

use super::Pipeline;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::progress::{Event, Observer, Stage};
use crate::provider::Provider;
use crate::weights::{Expanding, Weights, readable_size};

/// What the caller has been told that goes on.
#[derive(PartialEq, Eq)]
enum Told {
    Nothing,
    Hashing,
    Waiting,
    Writing,
}

impl Pipeline {
    /// Has `weights` give the f16 and bf16 tensors that `graph` needs out of an expansion, where the provider computes in
    /// f32 on the host's memory. `what` names the component, e.g. `unet of sdxl-base`.
    pub(super) fn expand(
        &self,
        weights: &mut Weights,
        graph: &Graph,
        what: &str,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        if self.runtime().provider() != Provider::Cpu {
            return Ok(());
        }
        // Before minutes of work for a file that does not fit.
        let needed = graph.weights.iter();
        weights.check(needed.map(|w| (w.name.as_str(), w.shape.as_slice())))?;
        let mut told = Told::Nothing;
        let needed = graph.weights.iter().map(|w| w.name.as_str());
        self.expansions.expand(weights, needed, &mut |expanding| {
            self.tell(&expanding, what, &mut told, observer)
        })?;
        if told == Told::Nothing {
            return Ok(());
        }
        self.begin_stage(observer, Stage::Load, what)
    }

    /// A key of what a component's files hold.
    pub(super) fn content_key(
        &self,
        weights: &Weights,
        (model, component): (&str, &str),
        observer: &mut Observer<'_>,
    ) -> Result<String> {
        let what = format!("{component} of {model}");
        let mut told = Told::Nothing;
        self.expansions.content_key(weights, &mut |expanding| {
            self.tell(&expanding, &what, &mut told, observer)
        })
    }

    fn tell(
        &self,
        expanding: &Expanding<'_>,
        what: &str,
        told: &mut Told,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let (now, text) = match expanding {
            Expanding::Hashing { total, .. } => {
                let size = readable_size(*total);
                (Told::Hashing, format!("{what} (hashing {size}, once)"))
            }
            Expanding::Waiting { folder } => {
                let folder = folder.display();
                let text = format!("{what} (waiting for another process that writes to {folder})");
                (Told::Waiting, text)
            }
            Expanding::Writing { folder, total, .. } => {
                let (size, folder) = (readable_size(*total), folder.display());
                let text = format!("{what} to f32 (once, {size} in {folder})");
                (Told::Writing, text)
            }
            Expanding::Damaged { file, reason } => {
                let text = format!("{} is made again: {reason}", file.display());
                return self.notify(observer, Event::Warning(&text), 0);
            }
            Expanding::NotNoted { reason } => {
                let text =
                    format!("the files of {what} will be hashed again at the next start: {reason}");
                return self.notify(observer, Event::Warning(&text), 0);
            }
        };
        let stage = if now == Told::Writing {
            Stage::Expand
        } else {
            Stage::Load
        };
        if *told != now {
            self.begin_stage(observer, stage, &text)?;
            *told = now;
        }
        match *expanding {
            Expanding::Hashing { done, total } | Expanding::Writing { done, total, .. } => {
                self.notify(observer, Event::Expansion { what, done, total }, 0)
            }
            _ if self.runtime().cancel().is_cancelled() => Err(Error::Cancelled { step: 0 }),
            _ => Ok(()),
        }
    }
}
