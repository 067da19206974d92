//! A weight file as memory: the crate's only memory mapping, or the bytes in this program.
//!
//! Python twin: the mapping inside `safetensors.safe_open`.

use std::fs::{File, Metadata};
use std::path::PathBuf;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::model_file::{ModelFile, Opened};

/// A file that is mapped read-only for as long as anything holds on to it, or is built in.
///
/// The operating system reads pages when they are first touched and may drop them again, so a mapping costs address
/// space, not memory. The price: if another program *shortens* the file meanwhile, touching a page that is gone ends
/// the process with SIGBUS, and if it rewrites the file in place, the new bytes show through. Programs that replace
/// model files by writing a new one and renaming it over the old one (the hub's cache, `git`, package managers) are
/// safe: the mapping keeps the old file.
#[derive(Debug)]
pub(super) struct Mapping {
    /// What errors call it.
    pub(super) path: PathBuf,
    /// What the system said of the file when it was opened; `None` for a built-in one.
    pub(super) meta: Option<Metadata>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    BuiltIn(&'static [u8]),
    Owned(Vec<u8>),
}

impl Mapping {
    /// The content of a file that is in memory already; `path` is what errors call it.
    pub(super) fn of(path: PathBuf, bytes: Vec<u8>) -> Self {
        Self {
            path,
            meta: None,
            bytes: Bytes::Owned(bytes),
        }
    }

    pub(super) fn open(file: &ModelFile) -> Result<Self> {
        let path = file.path();
        let fault = |reason| Error::Weights {
            path: path.clone(),
            reason,
        };
        let remedy = "correct the path in the catalogue, or fetch the file";
        let cannot = |e| fault(format!("cannot be mapped into memory: {e}"));
        let (bytes, meta) = match file.open(remedy, fault)? {
            Opened::Disk(file, _) => {
                let meta = file.metadata().map_err(cannot)?;
                (Bytes::Mapped(map(&file).map_err(cannot)?), Some(meta))
            }
            Opened::BuiltIn(bytes) => (Bytes::BuiltIn(bytes), None),
        };
        Ok(Self { path, meta, bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::BuiltIn(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and private to this type, which never hands out anything mutable. What cannot be
    // ruled out is another process changing the file while it is mapped; that is documented at `Mapping`, and every
    // bit pattern is a valid u8 and f32, so changed bytes are wrong numbers and not undefined values.
    unsafe { Mmap::map(file) }
}
