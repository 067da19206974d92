//! What a run tells its caller while it works, and how the caller stops it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::tensor::Latents;

/// A part of a run whose time is reported by itself.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Files are fetched from the hub.
    Download,
    /// Graphs are read and sessions built.
    Load,
    /// f16 or bf16 weights are expanded to f32 on disk, once.
    Expand,
    /// LoRAs are merged into an overlay.
    Merge,
    /// Prompts become embeddings and keys and values.
    Text,
    /// Reference pictures become keys and values.
    Image,
    /// The denoising steps.
    Denoise,
    /// Latents become pictures.
    Decode,
    /// Pictures or latents are written.
    Write,
}

/// One message from a running pipeline.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins; `what` names the component or file.
    Stage {
        /// The stage.
        stage: Stage,
        /// The component or file, e.g. `unet of sdxl-base`.
        what: &'a str,
    },
    /// Bytes of a download that have arrived.
    Download {
        /// The file.
        file: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all, 0 when unknown.
        total: u64,
    },
    /// Bytes of weight files that have been hashed, or of their expansion or an overlay that have been written.
    Expansion {
        /// The component, e.g. `unet of sdxl-base`, or what is done.
        what: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The guided model output of one network evaluation, before the scheduler uses it.
    ModelOutput {
        /// Zero-based step.
        step: usize,
        /// Timestep given to the network.
        timestep: f64,
        /// What the network was given, `[batch, 4, height/8, width/8]`.
        input: &'a Latents,
        /// Guided output `[batch, 4, height/8, width/8]`.
        output: &'a Latents,
    },
    /// A step is done.
    Step {
        /// Steps done so far in the whole schedule.
        done: usize,
        /// Steps in the whole schedule.
        total: usize,
        /// The latents after the step, in the scheduler's convention.
        latents: &'a Latents,
    },
    /// A choice that was made for the user, e.g. the memory mode.
    Note(&'a str),
    /// Something the user should know and that is not an error, e.g. words of the prompt that do not fit.
    Warning(&'a str),
}

/// What the receiver of an [`Event`] wants to happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop; the run ends with [`crate::Error::Cancelled`].
    Cancel,
}

/// The receiver of a run's events.
pub type Observer<'a> = dyn FnMut(Event<'_>) -> Control + 'a;

/// Something that [`Cancel::cancel`] stops at once.
pub trait Interrupt: Send + Sync {
    /// Stops it.
    fn interrupt(&self);
}

/// A switch that stops a run from another thread, inside a step too. Once thrown it stays thrown: a new run needs a
/// pipeline with a new switch.
#[derive(Clone, Default)]
pub struct Cancel(Arc<State>);

#[derive(Default)]
struct State {
    cancelled: AtomicBool,
    running: Mutex<Vec<Weak<dyn Interrupt>>>,
}

impl Cancel {
    /// Stops whatever runs under this switch. May be called from any thread, any number of times.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        let running = self
            .0
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        running
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|r| r.interrupt());
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Has `running` stopped on cancellation (at once if that was before), as long as it lives.
    pub fn watch(&self, running: Weak<dyn Interrupt>) {
        let mut all = self
            .0
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.is_cancelled() {
            running.upgrade().iter().for_each(|r| r.interrupt());
        }
        all.retain(|r| r.strong_count() > 0);
        all.push(running);
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancel").field(&self.is_cancelled()).finish()
    }
}
