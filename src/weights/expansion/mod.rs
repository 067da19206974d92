//! f16 and bf16 weights expanded to f32 on disk, once, and mapped from then on.
//!
//! Widened in memory, a checkpoint of 5 GB is 10 GB that the system cannot take back, made anew at every start. As a file
//! they are page cache: read when touched, dropped when memory is short, there at the next start.
//!
//! ```text
//! weights/<key>.safetensors    all f16 and bf16 tensors of one component's files, as f32
//! weights/sources/<name>.json  which files had which key, and what told then that they are those files
//! weights/lock                 held by whoever writes an expansion
//! weights/.tronie-….part       one that is being written, or that a killed run has left
//! ```
//!
//! The key is a hash of the files' contents, so that copies of a checkpoint share one expansion and a changed file never
//! gets another's. The names of the hub's blobs would be such hashes too, but nothing says that whoever filled that cache
//! has verified them.
//!
//! No Python twin: torch widens in memory (`from_pretrained(..., torch_dtype=torch.float32)`).

mod entries;
pub(super) mod records;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use safetensors::{Dtype, SafeTensors};

pub use entries::{Entry, Origin, OriginState};
use write::Layout;

use super::data::{WeightData, widener};
use super::mapping::Mapping;
use super::{Stored, Weights, header};
use crate::error::{Error, Result};

/// f32 bytes from which on an expansion is worth a file.
const SMALLEST: u64 = 64 << 20;
/// Where the key stands in an expansion's header.
const KEY_FIELD: &str = "tronie.expansion";
/// How often a waiting process looks whether the other one is done.
const POLL: Duration = Duration::from_millis(200);

/// The folder of expansions, or the decision to have none.
#[derive(Debug, Clone)]
pub struct ExpansionCache {
    place: Place,
    smallest: u64,
}

#[derive(Debug, Clone)]
enum Place {
    Folder(PathBuf),
    Off,
    Unknown,
}

/// What [`ExpansionCache::expand`] is doing.
#[derive(Debug, Clone, Copy)]
pub enum Expanding<'a> {
    /// The weight files are hashed, because it is not known what they hold.
    Hashing {
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Another process is writing to the folder.
    Waiting {
        /// The folder.
        folder: &'a Path,
    },
    /// The expansion is written.
    Writing {
        /// The folder.
        folder: &'a Path,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// An expansion is there but not whole. It is made again.
    Damaged {
        /// The file.
        file: &'a Path,
        /// What is wrong with it.
        reason: &'a str,
    },
    /// The key of the weight files cannot be noted, so that they will be hashed again.
    NotNoted {
        /// Why.
        reason: &'a str,
    },
}

/// Called several times a second. An error from it ends the expansion, is what [`ExpansionCache::expand`] returns, and
/// leaves no file.
pub type OnExpanding<'a> = dyn FnMut(Expanding<'_>) -> Result<()> + 'a;

/// An expansion in use.
#[derive(Debug)]
pub(super) struct Expanded {
    map: Arc<Mapping>,
    /// By the place of what was expanded: the number of its file and its first byte there.
    ranges: BTreeMap<(usize, usize), Range<usize>>,
}

impl Expanded {
    /// A tensor of the sources, or a part of one, if it is here.
    pub(super) fn tensor(&self, stored: &Stored) -> Option<WeightData> {
        widener(stored.dtype)?;
        let place = (stored.file, stored.range.start);
        let (&(file, start), range) = self.ranges.range(..=place).next_back()?;
        let first = range.start + (stored.range.start - start) * 2;
        let part = first..first + stored.range.len() * 2;
        let is_here = file == stored.file && part.end <= range.end;
        let shape = stored.shape.clone();
        is_here.then(|| WeightData::read(&self.map, part, Dtype::F32, shape))?
    }
}

/// What lies where an expansion belongs.
enum Found {
    Whole(Expanded),
    Nothing,
    Damaged(String),
}

impl ExpansionCache {
    /// Expansions in `folder`, which need not exist yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            place: Place::Folder(folder.into()),
            smallest: SMALLEST,
        }
    }

    /// No expansions: weights are widened in memory.
    pub fn off() -> Self {
        Self {
            place: Place::Off,
            smallest: SMALLEST,
        }
    }

    /// What the environment says: `weights` in `$TRONIE_CACHE`, none if that is `off`; in `tronie` in the system's folder
    /// for caches if it is not set.
    pub fn from_env() -> Self {
        Self::from_vars(std::env::var_os("TRONIE_CACHE"), dirs::cache_dir())
    }

    /// [`ExpansionCache::from_env`] for any setting. An empty one counts as not set.
    pub fn from_vars(setting: Option<OsString>, system: Option<PathBuf>) -> Self {
        match setting.filter(|value| !value.is_empty()) {
            Some(value) if value == "off" => Self::off(),
            Some(value) => Self::at(Path::new(&value).join("weights")),
            None => system.map_or(
                Self {
                    place: Place::Unknown,
                    smallest: SMALLEST,
                },
                |folder| Self::at(folder.join("tronie").join("weights")),
            ),
        }
    }

    /// With another limit below which weights are widened in memory: bytes that a graph's f16 and bf16 weights have as
    /// f32, 64 MiB unless set.
    #[must_use]
    pub fn with_smallest(mut self, bytes: u64) -> Self {
        self.smallest = bytes;
        self
    }

    /// The folder; none if it is turned off or no home directory is known.
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder(folder) => Some(folder),
            Place::Off | Place::Unknown => None,
        }
    }

    /// Lets `weights` have their f16 and bf16 tensors from an expansion, which is made first if there is none, provided
    /// that those among `needed` are large enough to be worth it.
    ///
    /// # Errors
    /// [`Error::Output`] if the expansion cannot be written, with the space that it needs; [`Error::Weights`] if a weight
    /// file is changed meanwhile. What `on_expanding` returns.
    pub fn expand<'n>(
        &self,
        weights: &mut Weights,
        needed: impl IntoIterator<Item = &'n str>,
        on_expanding: &mut OnExpanding<'_>,
    ) -> Result<()> {
        let narrow = needed.into_iter().map(|name| weights.wide_bytes(name));
        // Elsewhere f32 values in a file are not f32 values in memory. What is built in is small, and has no file.
        let on_disk = weights.files.iter().all(|map| map.meta.is_some());
        let mappable = cfg!(target_endian = "little") && on_disk;
        if !mappable || narrow.sum::<u64>() < self.smallest.max(1) {
            return Ok(());
        }
        let folder = match &self.place {
            Place::Folder(folder) => folder,
            Place::Off => return Ok(()),
            Place::Unknown => {
                let reason = "no home directory is known: set TRONIE_CACHE to a folder for weights that are expanded to \
                              f32, or to `off` to have them in memory";
                return Err(cannot_write(
                    Path::new("weights"),
                    io::Error::new(io::ErrorKind::NotFound, reason),
                ));
            }
        };
        let key = records::key_of(folder, weights, on_expanding)?;
        let layout = Layout::of(weights);
        let target = folder.join(format!("{key}.safetensors"));
        let mut found = find(&target, &key, &layout);
        if !matches!(found, Found::Whole(_)) {
            let _lock = lock(folder, on_expanding)?;
            // Another process may have made it while this one waited.
            found = find(&target, &key, &layout);
            if !matches!(found, Found::Whole(_)) {
                if let Found::Damaged(reason) = &found {
                    let file = &target;
                    on_expanding(Expanding::Damaged { file, reason })?;
                }
                entries::sweep(folder);
                write::write(&target, &key, &layout, weights, on_expanding)?;
                found = find(&target, &key, &layout);
            }
        }
        match found {
            Found::Whole(expanded) => weights.expanded = Some(Arc::new(expanded)),
            Found::Nothing => return Err(unreadable(&target, "it is gone already")),
            Found::Damaged(reason) => return Err(unreadable(&target, &reason)),
        }
        Ok(())
    }
}

impl ExpansionCache {
    /// A key of what the files of `weights` hold. It is noted in the folder, so that they are hashed once.
    ///
    /// # Errors
    /// [`Error::Weights`] if a file is changed meanwhile. What `on_expanding` returns.
    pub fn content_key(
        &self,
        weights: &Weights,
        on_expanding: &mut OnExpanding<'_>,
    ) -> Result<String> {
        let on_disk = weights.files.iter().all(|map| map.meta.is_some());
        match self.folder().filter(|_| on_disk) {
            Some(folder) => records::key_of(folder, weights, on_expanding),
            None => records::hash(&weights.files, on_expanding),
        }
    }
}

impl Weights {
    /// Bytes that a tensor would have as f32 if it has to be widened for that, else 0. One with changes is in memory in any
    /// case, and one that is replaced lies elsewhere.
    fn wide_bytes(&self, name: &str) -> u64 {
        let elsewhere = self.changes.contains_key(name) || self.replaced.contains_key(name);
        match self.tensors.get(name) {
            Some(_) if elsewhere => 0,
            Some(stored) if widener(stored.dtype).is_some() => stored.range.len() as u64 * 2,
            _ => 0,
        }
    }
}

/// Looks for the expansion of `layout` at `target`, and whether it is whole.
fn find(target: &Path, key: &str, layout: &Layout) -> Found {
    match Mapping::open(&target.into()) {
        Ok(map) => match check(map.bytes(), key, layout) {
            Ok(ranges) => Found::Whole(Expanded {
                map: Arc::new(map),
                ranges,
            }),
            Err(reason) => Found::Damaged(reason),
        },
        Err(Error::Missing { .. }) => Found::Nothing,
        Err(Error::Weights { reason, .. }) => Found::Damaged(reason),
        Err(error) => Found::Damaged(error.to_string()),
    }
}

/// Where each tensor lies in an expansion that is whole and the right one.
fn check(
    file: &[u8],
    key: &str,
    layout: &Layout,
) -> Result<BTreeMap<(usize, usize), Range<usize>>, String> {
    let entries = header::read(file)?.entries;
    if recorded_key(file).as_deref() != Some(key) {
        return Err("its header does not say that it is the expansion of these files".into());
    }
    let fits = entries.len() == layout.tensors.len()
        && entries.iter().all(|entry| {
            entry.dtype == Dtype::F32
                && layout
                    .tensors
                    .get(entry.name.as_str())
                    .is_some_and(|source| source.shape == entry.shape)
        });
    if !fits {
        return Err("it does not hold the tensors of these files".into());
    }
    // One without values lies where the next one does.
    let entries = entries.into_iter().filter(|entry| !entry.range.is_empty());
    let place = |name: &str| layout.tensors[name].place;
    Ok(entries.map(|e| (place(&e.name), e.range)).collect())
}

/// The key in a file's header, if it is one of an expansion.
fn recorded_key(file: &[u8]) -> Option<String> {
    let (_, metadata) = SafeTensors::read_metadata(file).ok()?;
    metadata.metadata().as_ref()?.get(KEY_FIELD).cloned()
}

/// What an expansion's header says of it.
fn key_field(key: &str) -> HashMap<String, String> {
    HashMap::from([(KEY_FIELD.to_owned(), key.to_owned())])
}

/// Waits until no other process writes to `folder`, and keeps others from it for as long as the file is open.
fn lock(folder: &Path, on_expanding: &mut OnExpanding<'_>) -> Result<File> {
    let lock = open_lock(folder).map_err(|e| cannot_write(folder, e))?;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => {
                on_expanding(Expanding::Waiting { folder })?;
                std::thread::sleep(POLL);
            }
            Err(TryLockError::Error(e)) => {
                let reason = format!("its file system cannot lock files ({e}); {ELSEWHERE}");
                return Err(cannot_write(folder, io::Error::new(e.kind(), reason)));
            }
        }
    }
}

fn open_lock(folder: &Path) -> io::Result<File> {
    let open = |e: io::Error| io::Error::new(e.kind(), format!("{e}; {ELSEWHERE}"));
    fs::create_dir_all(folder).map_err(open)?;
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))
        .map_err(open)
}

/// What helps when the folder does not serve.
const ELSEWHERE: &str = "set TRONIE_CACHE to another folder for weights that are expanded to f32, or to `off` to have \
                         them in memory at every start";

fn cannot_write(path: &Path, source: io::Error) -> Error {
    Error::Output {
        path: path.to_owned(),
        source,
    }
}

fn unreadable(target: &Path, reason: &str) -> Error {
    let reason = format!("was just written and cannot be used: {reason}; {ELSEWHERE}");
    Error::Weights {
        path: target.to_owned(),
        reason,
    }
}

/// A number of bytes as people say it.
pub fn readable_size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
