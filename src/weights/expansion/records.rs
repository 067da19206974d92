//! Which weight files have which key: hashed once, then known again by path, size, times and place on disk.

use std::fs::{self, File, Metadata};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::super::Weights;
use super::super::mapping::Mapping;
use super::{Expanding, OnExpanding};
use crate::error::{Error, Result};
use crate::files::{read_input, write_pending};

/// What the key is a key of. Another form of expansions must have other keys.
const FORM: &str = "tronie expansion of safetensors files to f32, form 1";
/// Bytes that are hashed between two looks at the cancel switch.
const STRIDE: usize = 64 << 20;
/// A file that was changed less than this before may change again without its times showing it: no file system in use
/// counts in larger steps (FAT).
const SETTLED: Duration = Duration::from_secs(2);
/// A record is a few lines a shard.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// The weight files of one component as they were when they were hashed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) key: String,
    /// Whether the files can be known again by what is noted here.
    pub(super) settled: bool,
    pub(super) files: Vec<Source>,
}

/// A weight file as the file system knows it. Times are in nanoseconds since 1970.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::weights) struct Source {
    /// As it was given, but absolute.
    pub(super) path: String,
    /// Without links.
    canonical: String,
    pub(super) bytes: u64,
    pub(super) modified: i64,
    /// Of the file's entry; unlike `modified` it cannot be set back. 0 where there is none.
    changed: i64,
    device: u64,
    inode: u64,
}

impl Source {
    pub(in crate::weights) fn of(path: &Path, meta: &Metadata) -> Self {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let canonical = path.canonicalize().unwrap_or_else(|_| absolute.clone());
        let (changed, device, inode) = identity(meta);
        Self {
            path: absolute.to_string_lossy().into_owned(),
            canonical: canonical.to_string_lossy().into_owned(),
            bytes: meta.len(),
            modified: meta.modified().map_or(0, nanoseconds),
            changed,
            device,
            inode,
        }
    }

    fn is_settled(&self, now: i64) -> bool {
        let latest = self.modified.max(self.changed);
        now.saturating_sub(latest) >= SETTLED.as_nanos() as i64
    }
}

#[cfg(unix)]
fn identity(meta: &Metadata) -> (i64, u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    let changed = meta
        .ctime()
        .saturating_mul(1_000_000_000)
        .saturating_add(meta.ctime_nsec());
    (changed, meta.dev(), meta.ino())
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> (i64, u64, u64) {
    (0, 0, 0)
}

pub(super) fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_nanos() as i64,
        Err(before) => -(before.duration().as_nanos() as i64),
    }
}

/// The key of the files of `weights`: the noted one if they are known, else by hashing them.
pub(super) fn key_of(
    folder: &Path,
    weights: &Weights,
    on_expanding: &mut OnExpanding<'_>,
) -> Result<String> {
    let now = SystemTime::now();
    let files: Vec<_> = weights
        .files
        .iter()
        .filter_map(|map| Some(Source::of(&map.path, map.meta.as_ref()?)))
        .collect();
    let place = place(folder, &files);
    if let Some(record) = read(&place)
        && record.settled
        && record.files == files
    {
        // The time of last use. A folder that cannot be written serves all the same.
        let _ = File::options()
            .write(true)
            .open(&place)
            .and_then(|file| file.set_modified(now));
        return Ok(record.key);
    }
    let key = hash(&weights.files, on_expanding)?;
    check_unchanged(weights)?;
    let now = nanoseconds(now);
    let record = Record {
        key,
        settled: files.iter().all(|file| file.is_settled(now)),
        files,
    };
    if let Err(error) = note(&place, &record) {
        let reason = error.to_string();
        on_expanding(Expanding::NotNoted { reason: &reason })?;
    }
    Ok(record.key)
}

/// Where the record of some files lies: by their paths, so that a changed file's record replaces the old one.
fn place(folder: &Path, files: &[Source]) -> std::path::PathBuf {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(&(file.path.len() as u64).to_le_bytes());
        hasher.update(file.path.as_bytes());
    }
    let name = format!("{}.json", hasher.finalize().to_hex());
    folder.join("sources").join(name)
}

/// A record, unless it is absent or damaged: then the files are simply hashed again.
pub(super) fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&read_input(path, MAX_RECORD_BYTES).ok()?).ok()
}

fn note(place: &Path, record: &Record) -> Result<()> {
    write_pending(place, |to| {
        serde_json::to_writer_pretty(&mut *to, record)?;
        writeln!(to)
    })?
    .publish()
}

/// Hashes files, whatever is noted of them.
pub(super) fn hash(
    files: &[std::sync::Arc<Mapping>],
    on_expanding: &mut OnExpanding<'_>,
) -> Result<String> {
    let total = files.iter().map(|map| map.bytes().len() as u64).sum();
    let mut done = 0;
    let mut hasher = blake3::Hasher::new_derive_key(FORM);
    for map in files {
        let bytes = map.bytes();
        // The length, so that two shards are not the same as the same bytes in one file.
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        for part in bytes.chunks(STRIDE) {
            on_expanding(Expanding::Hashing { done, total })?;
            hasher.update_rayon(part);
            done += part.len() as u64;
        }
    }
    on_expanding(Expanding::Hashing { done, total })?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Whether every file is still what it was when it was opened: what was read from it then is its content.
pub(super) fn check_unchanged(weights: &Weights) -> Result<()> {
    for map in &weights.files {
        let Some(then) = &map.meta else { continue };
        let same = fs::metadata(&map.path)
            .is_ok_and(|now| Source::of(&map.path, &now) == Source::of(&map.path, then));
        if !same {
            return Err(Error::Weights {
                path: map.path.clone(),
                reason: "was changed or moved while it was read; run again when it is complete"
                    .into(),
            });
        }
    }
    Ok(())
}
