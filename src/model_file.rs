//! A model's file: on disk, or compiled into this program.
//!
//! The repository's catalogue, its graphs and (with the feature `demo`) the demo models are compiled in, so that the
//! executable alone is enough in any folder. They are read where they lie in the executable, which the operating system
//! maps as it maps a file.

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What the built-in files are called in messages, and the built-in catalogue in `--models`.
pub const BUILT_IN: &str = "built-in";
/// The built-in catalogue's name among the built-in files.
const CATALOGUE: &str = "catalogue";

/// A file that a model consists of, or the catalogue; whether it is there shows when it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFile {
    /// A path on this machine.
    Disk(PathBuf),
    /// The name of a file in this program: its path in the repository.
    BuiltIn(PathBuf),
}

/// A file that was found.
pub(crate) enum Opened {
    /// The file and its length in bytes.
    Disk(File, u64),
    /// The content.
    BuiltIn(&'static [u8]),
}

/// Weights are used where they lie, so they must lie as in a mapped file: f32 at multiples of 4.
#[repr(C, align(64))]
struct Aligned<T>(T);

macro_rules! built_in {
    ($($path:literal),* $(,)?) => {
        &[
            (CATALOGUE, &Aligned(*include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models.yaml"))).0),
            $(($path, &Aligned(*include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $path))).0)),*
        ]
    };
}

/// Names and contents; the list is made by `build.rs`.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/built_in.rs"));

impl ModelFile {
    /// The built-in catalogue.
    pub fn built_in_catalogue() -> Self {
        Self::BuiltIn(CATALOGUE.into())
    }

    /// A file that this one names: relative paths start at this file's folder.
    #[must_use]
    pub fn beside(&self, path: &Path) -> Self {
        let join = |own: &Path| own.parent().unwrap_or(Path::new("")).join(path);
        match self {
            Self::Disk(own) => Self::Disk(join(own)),
            Self::BuiltIn(own) => Self::BuiltIn(join(own)),
        }
    }

    /// Whether there is such a file.
    pub fn exists(&self) -> bool {
        match self {
            Self::Disk(path) => path.is_file(),
            Self::BuiltIn(name) => built_in(name).is_some(),
        }
    }

    /// What errors call it: its path, or `built-in` and its name.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Disk(path) => path.clone(),
            Self::BuiltIn(name) => format!("{BUILT_IN} {}", name.display()).into(),
        }
    }

    /// Opens it: a built-in file, or a regular one (through links, as the hub's cache has them).
    ///
    /// Anything else on disk is refused before it is opened: opening a pipe would wait for ever, and reading a device
    /// need not end. `fault` makes the caller's kind of error.
    pub(crate) fn open(&self, remedy: &str, fault: impl Fn(String) -> Error) -> Result<Opened> {
        match self {
            Self::Disk(path) => open(path, remedy, fault),
            Self::BuiltIn(name) => {
                built_in(name)
                    .map(Opened::BuiltIn)
                    .ok_or_else(|| Error::Missing {
                        path: self.path(),
                        remedy: remedy.to_owned(),
                    })
            }
        }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for ModelFile {
    fn from(path: &P) -> Self {
        Self::Disk(path.as_ref().to_owned())
    }
}

impl From<PathBuf> for ModelFile {
    fn from(path: PathBuf) -> Self {
        Self::Disk(path)
    }
}

impl fmt::Display for ModelFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().display().fmt(f)
    }
}

impl Opened {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Disk(_, length) => *length,
            Self::BuiltIn(bytes) => bytes.len() as u64,
        }
    }

    /// The content, without copying what is built in; at most `limit` bytes of a file that has grown meanwhile.
    pub(crate) fn read(self, limit: u64) -> io::Result<Cow<'static, [u8]>> {
        match self {
            Self::Disk(file, _) => {
                let mut bytes = Vec::new();
                file.take(limit).read_to_end(&mut bytes)?;
                Ok(bytes.into())
            }
            Self::BuiltIn(bytes) => Ok(bytes.into()),
        }
    }
}

fn built_in(name: &Path) -> Option<&'static [u8]> {
    let name = name.to_str()?;
    let found = FILES.iter().find(|(known, _)| *known == name);
    found.map(|(_, bytes)| *bytes)
}

fn open(path: &Path, remedy: &str, fault: impl Fn(String) -> Error) -> Result<Opened> {
    let meta = fs::metadata(path).map_err(|e| cannot_open(path, remedy, &e, &fault))?;
    if meta.is_dir() {
        return Err(fault("is a directory: name the file itself".into()));
    }
    if !meta.is_file() {
        return Err(fault(
            "is not a regular file (a pipe, socket or device): name a file on disk".into(),
        ));
    }
    let file = File::open(path).map_err(|e| cannot_open(path, remedy, &e, &fault))?;
    let length = file
        .metadata()
        .map_err(|e| cannot_open(path, remedy, &e, &fault))?
        .len();
    Ok(Opened::Disk(file, length))
}

fn cannot_open(
    path: &Path,
    remedy: &str,
    error: &io::Error,
    fault: impl Fn(String) -> Error,
) -> Error {
    if error.kind() != io::ErrorKind::NotFound {
        return fault(format!("cannot be opened: {error}"));
    }
    let remedy = match fs::read_link(path) {
        Ok(target) => format!(
            "it is a link to {}, which does not exist; {remedy}",
            target.display()
        ),
        Err(_) => remedy.to_owned(),
    };
    Error::Missing {
        path: path.to_owned(),
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_files_lie_as_mapped_files_do() {
        for (name, bytes) in FILES {
            assert!(bytes.as_ptr().addr().is_multiple_of(64), "{name}");
        }
    }

    #[test]
    fn files_are_found_beside_the_file_that_names_them() {
        let catalogue = ModelFile::from("some/models.yaml");
        let beside = |path: &str| catalogue.beside(Path::new(path));
        assert_eq!(beside("a/b"), ModelFile::from("some/a/b"));
        assert_eq!(beside("/a/b"), ModelFile::from("/a/b"));
        let graph = ModelFile::built_in_catalogue()
            .beside(Path::new("graphs/sdxl-base/unet.fused.onnx.gz"));
        assert!(graph.exists());
        assert_eq!(
            graph.to_string(),
            "built-in graphs/sdxl-base/unet.fused.onnx.gz"
        );
    }

    #[test]
    fn what_is_not_built_in_is_missing_and_never_looked_for_on_disk() {
        let stray = ModelFile::built_in_catalogue().beside(Path::new("Cargo.toml"));
        assert!(!stray.exists() && Path::new("Cargo.toml").is_file());
        let fault = |reason| Error::request("models", reason);
        match stray.open("do this", fault) {
            Err(Error::Missing { path, remedy }) => {
                assert_eq!(
                    (path, remedy),
                    ("built-in Cargo.toml".into(), "do this".into())
                );
            }
            _ => panic!("opened"),
        }
    }
}
