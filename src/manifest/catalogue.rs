//! The catalogue: found, read, checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::given::Given;
use super::variant::{Entry, LIKE, whole};
use super::{FileRef, HubFile, LoraEntry, Model, Role};
use crate::error::{Error, Result};
use crate::model_file::{BUILT_IN, ModelFile};

/// The catalogue's file name.
const NAME: &str = "models.yaml";
/// Version of the schema that this engine reads.
const FORMAT: u32 = 1;
/// A catalogue is written by hand or by the exporter; a larger file is something else.
const MAX_BYTES: u64 = 1 << 20;

/// A checked `models.yaml`.
#[derive(Debug, Clone)]
pub struct Catalogue {
    /// The file it was read from.
    pub file: ModelFile,
    /// Entries by name.
    pub models: BTreeMap<String, Model>,
    /// LoRAs by name.
    pub loras: BTreeMap<String, LoraEntry>,
    /// The base model that requests mean which name none.
    default: Option<String>,
    given: Given,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    format: u32,
    models: BTreeMap<String, Entry>,
    #[serde(default)]
    loras: BTreeMap<String, LoraEntry>,
}

impl Catalogue {
    /// The file that `--models` or the request's field `models` names: a path, or `built-in` for the catalogue inside this
    /// program (a file of that name is `./built-in`).
    pub fn named(models: &Path) -> ModelFile {
        if models == Path::new(BUILT_IN) {
            ModelFile::built_in_catalogue()
        } else {
            models.into()
        }
    }

    /// The catalogue that is used when none is named: `$TRONIE_MODELS`, else `models.yaml` in the working directory, else
    /// beside the executable, else the built-in one.
    pub fn find() -> ModelFile {
        if let Some(models) = std::env::var_os("TRONIE_MODELS").filter(|p| !p.is_empty()) {
            return Self::named(Path::new(&models));
        }
        let beside = std::env::current_exe()
            .and_then(|p| p.canonicalize())
            .map(|exe| exe.with_file_name(NAME));
        [PathBuf::from(NAME)]
            .into_iter()
            .chain(beside)
            .find(|p| p.is_file())
            .map_or_else(ModelFile::built_in_catalogue, ModelFile::Disk)
    }

    /// Reads the catalogue that `models` names ([`Catalogue::named`]), else the one that is found ([`Catalogue::find`]).
    ///
    /// # Errors
    /// Those of [`Catalogue::load`].
    pub fn open(models: Option<&Path>) -> Result<Self> {
        Self::load(models.map_or_else(Self::find, Self::named))
    }

    /// Reads and checks a catalogue.
    ///
    /// The built-in one has only entries whose files are built in or in a hub repository: not the demo models' where the
    /// feature `demo` is off, nor those of other local checkpoints that the repository's catalogue had at build time.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is no such file, [`Error::Manifest`] with line and remedy when it is not right.
    pub fn load(file: impl Into<ModelFile>) -> Result<Self> {
        let file = file.into();
        let fail = |reason: String| Error::Manifest {
            path: file.path(),
            reason,
        };
        let text = read(&file)?;
        // The untyped pass is the one that notices duplicate keys.
        let untyped: serde_yaml::Value =
            serde_yaml::from_str(&text).map_err(|e| fail(e.to_string()))?;
        check_variants(&untyped).map_err(fail)?;
        let content: Content = serde_yaml::from_str(&text).map_err(|e| fail(e.to_string()))?;
        if content.format != FORMAT {
            return Err(fail(format!(
                "format {} is not known; this tronie reads format {FORMAT}",
                content.format
            )));
        }
        if content.models.is_empty() {
            return Err(fail("no models defined".into()));
        }
        let mut models = BTreeMap::new();
        for name in content.models.keys() {
            let model = whole(name, &content.models).and_then(|m| m.check().map(|()| m));
            let model = model.map_err(|reason| fail(format!("models.{name}: {reason}")))?;
            models.insert(name.clone(), model);
        }
        for (name, lora) in &content.loras {
            lora.check(name)
                .map_err(|reason| fail(format!("loras.{name}: {reason}")))?;
        }
        let mut loras = content.loras;
        if let ModelFile::BuiltIn(_) = file {
            models.retain(|_, model| is_whole(model, &file));
            loras.retain(|_, lora| is_here(&lora.file, &file));
        }
        let mut catalogue = Self {
            file,
            models,
            loras,
            default: None,
            given: Given::default(),
        };
        catalogue.default = catalogue.only_base(|_| true);
        Ok(catalogue)
    }

    /// The base model that a request means which names none: the only one there, else the only one whose files are here,
    /// if [`Catalogue::settle_default`] has looked.
    pub fn default_model(&self) -> Option<&str> {
        self.default.as_deref()
    }

    /// Finds the default among several base models: the only one whose files are all here; `cached` tells it of a hub's.
    pub fn settle_default(&mut self, cached: impl Fn(&HubFile) -> bool) {
        let here = |file: &FileRef| match file {
            FileRef::Path(path) => self.locate(path).exists(),
            FileRef::Given(path) => path.is_file(),
            FileRef::Hub(file) => cached(file),
        };
        if self.default.is_none() {
            self.default = self.only_base(|model| model.own_files().all(here));
        }
    }

    /// The only base model that is `wanted`.
    fn only_base(&self, wanted: impl Fn(&Model) -> bool) -> Option<String> {
        let mut bases = self
            .models
            .iter()
            .filter(|(_, model)| model.role == Role::Base && wanted(model));
        match (bases.next(), bases.next()) {
            (Some((name, _)), None) => Some(name.clone()),
            _ => None,
        }
    }

    /// The entry called `name`, asked for by the request's field `field`; of a file that was added ([`Catalogue::add`])
    /// too.
    ///
    /// # Errors
    /// [`Error::Request`] that lists the known models.
    pub fn model(&self, field: &'static str, name: &str) -> Result<&Model> {
        let model = self.models.get(name).or_else(|| self.given.get(name));
        model.ok_or_else(|| {
            let known = self.models.keys().map(String::as_str).collect::<Vec<_>>();
            let reason = format!(
                "no model `{name}` in {}, and no file of that name; known: {}",
                self.file,
                known.join(", ")
            );
            Error::request(field, reason)
        })
    }

    /// The file that a request means by a model's name: one that is none of the catalogue's, and that is a file's or could
    /// be nothing else. A file that has a model's name is `./NAME`.
    pub fn file_of(&self, name: &str) -> Option<PathBuf> {
        let path = Path::new(name);
        let is_path = || {
            let extension = path.extension();
            extension.is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
                || name.contains(std::path::is_separator)
                || path.is_file()
        };
        (!self.models.contains_key(name) && is_path()).then(|| path.to_owned())
    }

    /// Whether a file's model has been added under `name`.
    pub fn has_added(&self, name: &str) -> bool {
        self.given.get(name).is_some()
    }

    /// Adds the model of a file, under the name that requests call it. One of that name that is there already stays.
    pub fn add(&self, name: &str, model: Model) {
        if !self.has_added(name) {
            self.given.add(name.to_owned(), model);
        }
    }

    /// A file that this catalogue names by `path`.
    pub fn locate(&self, path: &Path) -> ModelFile {
        self.file.beside(path)
    }
}

/// Refuses variants that do not say so at once, which are taken for whole entries.
fn check_variants(catalogue: &serde_yaml::Value) -> Result<(), String> {
    let models = catalogue
        .get("models")
        .and_then(|models| models.as_mapping());
    for (name, entry) in models.into_iter().flatten() {
        let mut keys = entry.as_mapping().into_iter().flatten().map(|(key, _)| key);
        if keys.position(|key| key == LIKE).is_some_and(|at| at > 0) {
            let name = name.as_str().unwrap_or_default();
            return Err(format!("models.{name}: `{LIKE}` must be the first key"));
        }
    }
    Ok(())
}

/// Whether everything that an entry of the built-in catalogue names locally is built in.
fn is_whole(model: &Model, catalogue: &ModelFile) -> bool {
    model.files().all(|file| is_here(file, catalogue))
        && model
            .graph_files()
            .all(|path| catalogue.beside(path).exists())
}

/// Whether a file of the built-in catalogue is built in, or in a hub repository.
fn is_here(file: &FileRef, catalogue: &ModelFile) -> bool {
    match file {
        FileRef::Path(path) => catalogue.beside(path).exists(),
        FileRef::Hub(_) | FileRef::Given(_) => true,
    }
}

fn read(file: &ModelFile) -> Result<String> {
    let fail = |reason: String| Error::Manifest {
        path: file.path(),
        reason,
    };
    let remedy = "name a catalogue with --models FILE, or make one with `python -m export model`";
    let opened = file.open(remedy, fail)?;
    if opened.len() > MAX_BYTES {
        return Err(fail(format!(
            "has {} bytes; a catalogue has at most {MAX_BYTES}",
            opened.len()
        )));
    }
    let bytes = opened.read(MAX_BYTES).map_err(|e| fail(e.to_string()))?;
    let text = str::from_utf8(&bytes).map_err(|e| fail(format!("is not UTF-8: {e}")))?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_offers_what_the_repositorys_does_or_all_but_the_demo() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join(NAME);
        let mut wanted = Catalogue::load(repository).unwrap().models;
        if !cfg!(feature = "demo") {
            wanted.retain(|name, _| !name.starts_with("demo"));
        }
        let built_in = Catalogue::open(Some(Path::new(BUILT_IN))).unwrap();
        assert!(wanted.contains_key("sdxl-base"));
        assert!(built_in.models.keys().eq(wanted.keys()));
    }

    #[test]
    fn an_entrys_graphs_are_all_that_were_exported_for_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let models = Catalogue::load(root.join(NAME)).unwrap().models;
        // A variant has its base's.
        for model in models.values().filter(|model| model.like.is_none()) {
            let mut known = model
                .graph_files()
                .map(|path| root.join(path))
                .collect::<Vec<_>>();
            let folder = known[0].parent().unwrap();
            let entries = std::fs::read_dir(folder).unwrap();
            let mut exported = entries.map(|e| e.unwrap().path()).collect::<Vec<_>>();
            exported.sort();
            known.sort();
            assert_eq!(known, exported);
        }
    }
}
