//! A model's parts by name: files found, graphs read, sessions built.

use super::Pipeline;
use super::loras::Loading;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::manifest::{FileRef, Model, TextEntry};
use crate::model_file::ModelFile;
use crate::plan::names;
use crate::progress::{Event, Observer, Stage};
use crate::runtime::Session;
use crate::text::{Frame, Tokenizer};
use crate::weights::Weights;

/// What becomes a session: a component, and how many of its last layers are left out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub component: &'a str,
    pub skip: usize,
}

impl<'a> From<&'a str> for Part<'a> {
    fn from(component: &'a str) -> Self {
        Self { component, skip: 0 }
    }
}

impl Pipeline {
    /// The session of one component of a model.
    pub(super) fn session(
        &self,
        name: &str,
        part: Part<'_>,
        loading: &Loading,
        observer: &mut Observer<'_>,
    ) -> Result<Session> {
        let graph = self.graph(name, part.component)?;
        self.session_of(graph, (name, part), loading, observer)
    }

    /// The session of a graph that is one component of a model.
    pub(super) fn session_of(
        &self,
        mut graph: Graph,
        (name, Part { component, skip }): (&str, Part<'_>),
        loading: &Loading,
        observer: &mut Observer<'_>,
    ) -> Result<Session> {
        let model = self.catalogue().model("model", name)?;
        let entry = &model.graphs[component];
        let files = self.files(model, &entry.weights, observer)?;
        let what = format!("{component} of {name}");
        self.begin_stage(observer, Stage::Load, &what)?;
        self.warn_of_training(model, (component, &files), observer)?;
        let mut weights = self.opened(model, &files, &entry.weights)?;
        // First, because what is changed needs no expansion.
        if let Some(changed) = loading.changed(name, &entry.weights) {
            changed.attach(&entry.weights, &mut weights)?;
        }
        // Whatever is left out: one expansion serves all.
        self.expand(&mut weights, &graph, &what, observer)?;
        graph
            .skip_layers(names::HIDDEN_STATES, skip)
            .map_err(|most| {
                let reason =
                    format!("{skip} is more than the {most} layers that {what} can leave out");
                Error::request("clip-skip", reason)
            })?;
        self.runtime()
            .session(component, &graph, &weights, loading.memory)
    }

    /// The weights called `key` out of their files, under the names that the model's graphs have.
    fn opened(&self, model: &Model, files: &[ModelFile], key: &str) -> Result<Weights> {
        let weights = Weights::open(files)?;
        if !model.is_in_checkpoint(key) {
            return Ok(weights);
        }
        let graphs = model.own_graphs();
        let paths = graphs.filter(|(_, graph)| graph.weights == key);
        let path = paths.flat_map(|(_, graph)| graph.files()).next();
        let graph = match path {
            Some(path) => Graph::load(self.catalogue().locate(path))?,
            None => Graph::default(),
        };
        let needed = graph.weights.iter().map(|weight| weight.name.as_str());
        checkpoint::component(&weights, key, needed)
    }

    /// Warns of a UNet in a whole model's file that was trained otherwise than its entry says.
    fn warn_of_training(
        &self,
        model: &Model,
        (component, files): (&str, &[ModelFile]),
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        if !names::is_unet(component) || !model.is_in_checkpoint(&model.graphs[component].weights) {
            return Ok(());
        }
        match checkpoint::advice(&Weights::open(files)?, model)? {
            Some(warning) => self.notify(observer, Event::Warning(&warning), 0),
            None => Ok(()),
        }
    }

    /// The graph of one component of a model, in the dialect that the provider wants.
    ///
    /// # Errors
    /// [`Error::Request`] for an unknown model, [`Error::Manifest`] where it has no such graph, those of [`Graph::load`].
    pub fn graph(&self, name: &str, component: &str) -> Result<Graph> {
        let model = self.catalogue().model("model", name)?;
        let dialect = self.runtime().provider().dialect();
        if !model.graphs.contains_key(component) {
            return Err(self.broken(
                name,
                &format!("graphs.{component} is missing; export the model again"),
            ));
        }
        let path = model.graph(component, dialect).ok_or_else(|| {
            let provider = self.runtime().provider();
            let reason = format!(
                "graphs.{component} has no `{dialect}` graph, which provider {provider} needs"
            );
            self.broken(
                name,
                &format!("{reason}; export the model with --dialect all"),
            )
        })?;
        Graph::load(self.catalogue().locate(path))
    }

    /// The tokenizer of one text encoder.
    pub(super) fn tokenizer(
        &self,
        entry: &TextEntry,
        observer: &mut Observer<'_>,
    ) -> Result<Tokenizer> {
        let facts = &entry.tokenizer;
        let frame = Frame {
            bos: facts.bos,
            eos: facts.eos,
            pad: facts.pad,
            length: facts.length,
        };
        match (&facts.json, &facts.vocab, &facts.merges) {
            (Some(json), ..) => Tokenizer::from_json(&self.file(json, observer)?, frame),
            (None, Some(vocab), Some(merges)) => Tokenizer::from_vocab(
                &self.file(vocab, observer)?,
                &self.file(merges, observer)?,
                frame,
            ),
            _ => Err(self.broken(&entry.encoder, "its tokenizer names no files")),
        }
    }

    /// The weights of a model with some key, as they are stored.
    pub(super) fn weights(
        &self,
        model: &Model,
        key: &str,
        observer: &mut Observer<'_>,
    ) -> Result<Weights> {
        self.opened(model, &self.files(model, key, observer)?, key)
    }

    fn files(
        &self,
        model: &Model,
        weights: &str,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<ModelFile>> {
        let files = model.weight_files(weights).iter();
        files.map(|file| self.file(file, observer)).collect()
    }

    /// A file in this program or on this machine, after a download if need be.
    pub(super) fn file(&self, file: &FileRef, observer: &mut Observer<'_>) -> Result<ModelFile> {
        let hub_file = match file {
            FileRef::Path(path) => {
                let file = self.catalogue().locate(path);
                return if file.exists() {
                    Ok(file)
                } else {
                    let catalogue = &self.catalogue().file;
                    Err(Error::Missing {
                        path: file.path(),
                        remedy: format!(
                            "{catalogue} names it; restore it or export the model again"
                        ),
                    })
                };
            }
            FileRef::Given(path) => return Ok(path.into()),
            FileRef::Hub(hub_file) => hub_file,
        };
        if let Some(path) = self.hub.cached(hub_file) {
            return Ok(path.into());
        }
        self.begin_stage(observer, Stage::Download, &hub_file.file)?;
        let fetched = self.hub.resolve(hub_file, &mut |transfer| {
            let (file, done, total) = (transfer.file, transfer.done, transfer.total.unwrap_or(0));
            self.notify(observer, Event::Download { file, done, total }, 0)
        });
        fetched.map(ModelFile::Disk)
    }

    fn broken(&self, entry: &str, reason: &str) -> Error {
        Error::Manifest {
            path: self.catalogue().file.path(),
            reason: format!("models.{entry}: {reason}"),
        }
    }
}
