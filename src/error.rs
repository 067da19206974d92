//! The one error type, cut by whose fault it is.
//!
//! Every variant names the thing that is wrong and carries enough to say what would be right. [`Error::code`] is stable:
//! it is the process's exit status and the status of the C ABI.

use std::path::PathBuf;

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The cause of a foreign error, kept as a source without exposing the library it came from.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, by fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of the request is not usable.
    #[error("{field}: {reason}")]
    Request {
        /// The request's field, under its command-line name (`guidance-rescale`).
        field: &'static str,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// `models.yaml` cannot be read, or says something impossible.
    #[error("{}: {reason}", path.display())]
    Manifest {
        /// The catalogue.
        path: PathBuf,
        /// Line, entry and remedy.
        reason: String,
    },
    /// A file that a model needs is not there.
    #[error("{} is missing: {remedy}", path.display())]
    Missing {
        /// The absent file.
        path: PathBuf,
        /// How to get it.
        remedy: String,
    },
    /// A picture, latents or request file from the user cannot be used.
    #[error("{}: {reason}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight file is malformed or does not fit its graph.
    #[error("{}: {reason}", path.display())]
    Weights {
        /// The weight file.
        path: PathBuf,
        /// The tensor and the mismatch.
        reason: String,
    },
    /// A graph file is malformed, or asks for something this engine does not run.
    #[error("{}: {reason}", path.display())]
    Graph {
        /// The graph file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A graph's inputs or outputs are not what the pipeline feeds or expects.
    #[error("{graph}: tensor `{tensor}`: expected {expected}, found {actual}")]
    Contract {
        /// The component, e.g. `unet`.
        graph: String,
        /// The tensor's name.
        tensor: String,
        /// What the pipeline expects.
        expected: String,
        /// What the graph has.
        actual: String,
    },
    /// A download failed or did not verify.
    #[error("{repo}/{file}: {reason}")]
    Hub {
        /// Repository, `owner/name`.
        repo: String,
        /// File inside the repository.
        file: String,
        /// What happened and what to do.
        reason: String,
    },
    /// The ONNX Runtime library cannot be found or used.
    #[error("ONNX Runtime: {reason}")]
    Library {
        /// What was tried and how to get it.
        reason: String,
    },
    /// The requested execution provider cannot be used.
    #[error("provider {provider} is not available: {reason}")]
    Provider {
        /// `cuda`, `trt`, `coreml`.
        provider: &'static str,
        /// ONNX Runtime's own words.
        reason: String,
    },
    /// ONNX Runtime failed to build or run a session.
    #[error("{graph}: {source}")]
    Runtime {
        /// The component, e.g. `unet`.
        graph: String,
        /// ONNX Runtime's error.
        source: Source,
    },
    /// A network produced NaN or infinity.
    #[error("{component} produced a non-finite value{}: {remedy}", step.map(|s| format!(" at step {s}")).unwrap_or_default())]
    NonFinite {
        /// The component, e.g. `unet`.
        component: String,
        /// Zero-based step, for networks that run once a step.
        step: Option<usize>,
        /// What usually helps.
        remedy: &'static str,
    },
    /// The VAE decoded to an entirely black picture.
    #[error(
        "{component} produced an all-black picture, which is how a broken VAE or checkpoint shows itself; nothing was written"
    )]
    Black {
        /// The component, e.g. `vae_decoder`.
        component: String,
    },
    /// The run was cancelled.
    #[error("cancelled at step {step}")]
    Cancelled {
        /// Zero-based step that was running.
        step: usize,
    },
    /// A result could not be written. Nothing half-written is left behind.
    #[error("cannot write {}: {source}", path.display())]
    Output {
        /// The target.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
}

impl Error {
    /// The stable number of this kind of error: exit status of the command line, status of the C ABI.
    ///
    /// 2 request, 3 input file, 4 model (catalogue, weights, graph, download), 5 runtime (library, provider, execution),
    /// 6 cancelled, 7 output.
    pub const fn code(&self) -> u8 {
        match self {
            Self::Request { .. } => 2,
            Self::Input { .. } => 3,
            Self::Manifest { .. }
            | Self::Missing { .. }
            | Self::Weights { .. }
            | Self::Graph { .. }
            | Self::Contract { .. }
            | Self::Hub { .. } => 4,
            Self::Library { .. }
            | Self::Provider { .. }
            | Self::Runtime { .. }
            | Self::NonFinite { .. }
            | Self::Black { .. } => 5,
            Self::Cancelled { .. } => 6,
            Self::Output { .. } => 7,
        }
    }

    /// Shorthand for [`Error::Request`].
    pub fn request(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Request {
            field,
            reason: reason.into(),
        }
    }
}

/// A name out of an untrusted file as it may stand in a message: quoted, control and bidirectional characters escaped,
/// and cut when it is absurdly long.
pub(crate) fn quoted(name: &str) -> String {
    const LONGEST: usize = 160;
    let mut shown: String = name
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if name.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}
