//! What a rule remembers of earlier steps.

use std::collections::VecDeque;

use super::{Step, same_shape};
use crate::error::{Error, Result};
use crate::tensor::Latents;

/// The latest few latents of some kind, oldest first.
#[derive(Debug)]
pub(super) struct History {
    kept: VecDeque<Latents>,
    most: usize,
}

impl History {
    /// An empty history that keeps at most `most` entries.
    pub(super) fn new(most: usize) -> Self {
        Self {
            kept: VecDeque::with_capacity(most + 1),
            most,
        }
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    /// The entry `back` places before the one to come, from 1; `otherwise` where there is none.
    pub(super) fn back<'a>(&'a self, back: usize, otherwise: &'a Latents) -> &'a Latents {
        self.kept.iter().nth_back(back - 1).unwrap_or(otherwise)
    }

    /// The newest entry.
    pub(super) fn newest(&self) -> Option<&Latents> {
        self.kept.back()
    }

    /// Adds the newest entry and forgets those that are too old.
    pub(super) fn push(&mut self, latents: Latents) {
        self.kept.push_back(latents);
        while self.kept.len() > self.most {
            self.kept.pop_front();
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
    }

    /// Everything, oldest first.
    pub(super) fn saved(&self) -> Vec<Latents> {
        self.kept.iter().cloned().collect()
    }

    /// Puts saved entries back.
    pub(super) fn restore(&mut self, saved: Vec<Latents>) -> Result<()> {
        restorable(&saved, self.most)?;
        self.kept = saved.into();
        Ok(())
    }

    /// Refuses a history that cannot be one of the steps before `at`, or of other latents than `x`.
    pub(super) fn check(&self, at: &Step<'_>, x: &Latents) -> Result<()> {
        at.schedule.levels(at.index)?;
        precedes(self.len(), at)?;
        self.kept.iter().try_for_each(|old| same_shape(old, x))
    }
}

/// Refuses more remembered steps than there were.
pub(super) fn precedes(steps: usize, at: &Step<'_>) -> Result<()> {
    if steps <= at.index {
        return Ok(());
    }
    let reason = format!(
        "a history of {steps} steps cannot precede step {}",
        at.index
    );
    Err(Error::request("scheduler", reason))
}

/// Refuses a history of more entries than the rule keeps.
pub(super) fn restorable(history: &[Latents], most: usize) -> Result<()> {
    if history.len() <= most {
        return Ok(());
    }
    Err(foreign(&format!(
        "a history of {} latents was saved, but this scheduler keeps {most}",
        history.len()
    )))
}

/// The error for a history that another scheduler must have saved.
pub(super) fn foreign(reason: &str) -> Error {
    Error::request(
        "scheduler",
        format!("{reason}; resume with the scheduler that the run was started with"),
    )
}
