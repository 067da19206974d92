//! What the folder of expansions holds, and how it is emptied again.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::records::{self, Record, Source, nanoseconds};
use super::{ExpansionCache, KEY_FIELD, cannot_write, open_lock};
use crate::error::Result;

/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 64;
/// Bytes of a header in which the key must stand: the metadata come first.
const HEAD: u64 = 256;

/// An expansion in the folder.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The key: 64 hexadecimal digits, a hash of the sources' contents.
    pub key: String,
    /// The file.
    pub file: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// When a pipeline used it last, as far as that is known.
    pub last_used: Option<SystemTime>,
    /// The weight files that it stands for, of every copy that was used.
    pub sources: Vec<Origin>,
    /// Whether no complete set of those weight files is there any more, so that nothing will use it.
    pub is_orphan: bool,
}

/// A weight file that an expansion was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Its path.
    pub path: String,
    /// What has become of it.
    pub state: OriginState,
}

/// What has become of a weight file since it was expanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginState {
    /// It is there.
    Present,
    /// Another file is there, or it has been written to.
    Changed,
    /// It is not there.
    Gone,
}

impl OriginState {
    /// The name in listings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Changed => "changed",
            Self::Gone => "gone",
        }
    }

    fn of(source: &Source) -> Self {
        match fs::metadata(&source.path) {
            Err(_) => Self::Gone,
            Ok(meta) => {
                let modified = meta.modified().map_or(0, nanoseconds);
                if (meta.len(), modified) == (source.bytes, source.modified) {
                    Self::Present
                } else {
                    Self::Changed
                }
            }
        }
    }
}

impl ExpansionCache {
    /// The expansions in the folder, the one used last first. Other files are passed over.
    ///
    /// # Errors
    /// [`crate::Error::Output`] if the folder is there and cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let Some(folder) = self.folder() else {
            return Ok(Vec::new());
        };
        let fail = |e| cannot_write(folder, e);
        let records = all_records(folder).map_err(fail)?;
        let mut entries = Vec::new();
        for file in files_in(folder).map_err(fail)? {
            if let Some(key) = key_of_expansion(&file) {
                let bytes = fs::metadata(&file).map_err(fail)?.len();
                entries.push(entry(key, file, bytes, &records));
            }
        }
        entries.sort_by(|a, b| b.last_used.cmp(&a.last_used).then(a.key.cmp(&b.key)));
        Ok(entries)
    }

    /// Deletes an expansion and what is noted of its sources. A process that has it mapped keeps it until it ends (except
    /// on Windows, where this fails then).
    ///
    /// # Errors
    /// [`crate::Error::Output`] if a file cannot be deleted.
    pub fn remove(&self, entry: &Entry) -> Result<()> {
        remove(&entry.file)?;
        let Some(folder) = self.folder() else {
            return Ok(());
        };
        let records = all_records(folder).map_err(|e| cannot_write(folder, e))?;
        records
            .iter()
            .filter(|(_, record, _)| record.key == entry.key)
            .try_for_each(|(path, ..)| remove(path))
    }

    /// Bytes of temporary files: left by killed runs, unless a process is just writing one.
    pub fn unfinished_bytes(&self) -> u64 {
        let parts = self.folder().map(unfinished).into_iter().flatten();
        parts
            .filter_map(|p| fs::metadata(p).ok())
            .map(|m| m.len())
            .sum()
    }

    /// Deletes the temporary files of killed runs. Returns whether that was possible: it is not while a process writes one.
    ///
    /// # Errors
    /// [`crate::Error::Output`] if the folder cannot be written.
    pub fn remove_unfinished(&self) -> Result<bool> {
        let Some(folder) = self.folder().filter(|folder| folder.is_dir()) else {
            return Ok(true);
        };
        let lock = open_lock(folder).map_err(|e| cannot_write(folder, e))?;
        let free = lock.try_lock().is_ok();
        if free {
            sweep(folder);
        }
        Ok(free)
    }
}

/// Deletes what killed runs have left. The caller holds the folder's lock, so nobody is writing any of it.
pub(super) fn sweep(folder: &Path) {
    for part in unfinished(folder) {
        // What cannot be deleted takes space, which is all that is wrong with it.
        let _ = fs::remove_file(part);
    }
}

/// The temporary files of `files::write_pending`.
fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let mut found = files_in(folder).unwrap_or_default();
    found.retain(|path| {
        path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with(".tronie-") && name.ends_with(".part")
        })
    });
    found
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(cannot_write(path, e)),
        _ => Ok(()),
    }
}

/// The ordinary files of a folder, which need not exist. Links are none.
fn files_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Every record with its file and the time of its last use.
fn all_records(folder: &Path) -> io::Result<Vec<(PathBuf, Record, Option<SystemTime>)>> {
    let files = files_in(&folder.join("sources"))?;
    Ok(files
        .into_iter()
        .filter_map(|path| {
            let used = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
            Some((path.clone(), records::read(&path)?, used))
        })
        .collect())
}

/// The key of an expansion, told by its name and its first bytes: no other file may be taken for one. (A damaged one is
/// one too; what is in it does not matter for listing and deleting.)
fn key_of_expansion(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let key = name.strip_suffix(".safetensors")?;
    let digits = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if key.len() != KEY_DIGITS || !digits(key) {
        return None;
    }
    let mut head = Vec::new();
    File::open(file)
        .ok()?
        .take(HEAD)
        .read_to_end(&mut head)
        .ok()?;
    let mark = format!(r#"{{"__metadata__":{{"{KEY_FIELD}":"{key}"}}"#);
    head.get(8..)?
        .starts_with(mark.as_bytes())
        .then(|| key.to_owned())
}

fn entry(
    key: String,
    file: PathBuf,
    bytes: u64,
    records: &[(PathBuf, Record, Option<SystemTime>)],
) -> Entry {
    let (mut sources, mut last_used, mut is_orphan) = (Vec::new(), None, true);
    for (_, record, used) in records.iter().filter(|(_, record, _)| record.key == key) {
        let origins = record.files.iter().map(|source| Origin {
            path: source.path.clone(),
            state: OriginState::of(source),
        });
        let origins: Vec<_> = origins.collect();
        is_orphan &= origins.iter().any(|o| o.state != OriginState::Present);
        sources.extend(origins);
        last_used = last_used.max(*used);
    }
    Entry {
        key,
        file,
        bytes,
        last_used,
        sources,
        is_orphan,
    }
}
