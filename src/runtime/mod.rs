//! The only code that knows `ort`: finds and loads ONNX Runtime, builds sessions from graphs and mapped weights, runs them.

mod binding;
mod library;
mod model;
mod options;
mod profile;
mod provider;
mod session;
mod value;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use binding::Binding;
pub use library::Library;
pub use profile::{NodeRun, Profile};
use session::Busy;
pub use session::{Feed, Session};

use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::memory::MemoryMode;
use crate::progress::Cancel;
use crate::provider::Provider;
use crate::weights::Weights;

/// A loaded ONNX Runtime with the provider that its sessions run on.
#[derive(Debug)]
pub struct Runtime {
    library: &'static Library,
    provider: Provider,
    threads: Option<usize>,
    cancel: Cancel,
    /// Where every session's profile goes.
    profiles: Option<profile::Folder>,
    /// Time inside ONNX Runtime's runs.
    busy: Arc<Busy>,
}

impl Runtime {
    /// Loads ONNX Runtime from `library`, or from where it is found (see [`Library`]), and makes sure that `provider` can be had.
    /// `threads` is the number of threads inside an operator; `None` leaves it to ONNX Runtime (one a physical core).
    /// Sessions stop when `cancel` fires.
    ///
    /// # Errors
    /// [`Error::Library`] when there is no usable library, [`Error::Provider`] with ONNX Runtime's reason.
    pub fn open(
        library: Option<&Path>,
        provider: Provider,
        threads: Option<usize>,
        cancel: Cancel,
    ) -> Result<Self> {
        let library = Library::load(library)?;
        provider::probe(library.environment(), provider)?;
        Ok(Self {
            library,
            provider,
            threads,
            cancel,
            profiles: None,
            busy: Arc::default(),
        })
    }

    /// The same runtime, whose sessions from now on write ONNX Runtime's profile of their operators into `folder` when
    /// they are dropped. Read them with [`Profile::read_all`].
    #[must_use]
    pub fn profiled(self, folder: &Path) -> Self {
        Self {
            profiles: Some(profile::Folder::new(folder)),
            ..self
        }
    }

    /// How long networks of this runtime have been running inside ONNX Runtime so far, all of them together.
    pub fn busy(&self) -> Duration {
        self.busy.total()
    }

    /// The library in use.
    pub fn library(&self) -> &Library {
        self.library
    }

    /// The provider that sessions run on.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The switch that stops running sessions.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Builds the session of `component` from its graph and weights. Weights that their file has in the type that the graph
    /// wants stay mapped and are not copied, except where `memory` trades memory for speed.
    ///
    /// # Errors
    /// [`Error::Weights`] when a tensor is missing or has another shape, [`Error::Runtime`] when ONNX Runtime refuses.
    pub fn session(
        &self,
        component: &str,
        graph: &Graph,
        weights: &Weights,
        memory: MemoryMode,
    ) -> Result<Session> {
        weights.check(
            graph
                .weights
                .iter()
                .map(|w| (w.name.as_str(), w.shape.as_slice())),
        )?;
        Session::build(self, component, graph, weights, memory)
    }
}

/// Which providers this machine's library can register, with the reason where it cannot.
///
/// # Errors
/// [`Error::Library`] when there is no usable library.
pub fn providers(library: Option<&Path>) -> Result<Vec<(Provider, Result<()>)>> {
    let library = Library::load(library)?;
    Ok(Provider::ALL
        .into_iter()
        .map(|p| (p, provider::probe(library.environment(), p)))
        .collect())
}

/// Where ONNX Runtime would be loaded from.
///
/// # Errors
/// [`Error::Library`] when it is nowhere.
pub fn find_library(explicit: Option<&Path>) -> Result<PathBuf> {
    library::find(explicit)
}

/// Wraps an ONNX Runtime error of `graph`.
fn runtime_error<R>(graph: &str, error: &ort::Error<R>) -> Error {
    Error::Runtime {
        graph: graph.to_owned(),
        source: error.to_string().into(),
    }
}
