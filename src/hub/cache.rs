//! The cache's folders: blobs by hash, and per commit a tree of links to them.
//!
//! ```text
//! models--owner--name/refs/main                the commit that the branch had
//! models--owner--name/snapshots/<commit>/FILE  → ../../blobs/<etag>
//! models--owner--name/blobs/<etag>             the contents; <etag>.part while they arrive
//! .locks/models--owner--name/<etag>.lock       held while they arrive
//! ```
//!
//! Python twin: `huggingface_hub.constants` and `file_download._create_symlink`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{CacheRepo, Repo};

use super::Place;
use super::names::is_commit;

/// The cache as far as it concerns one file.
pub(super) struct Cache<'a> {
    place: Place<'a>,
    layout: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl<'a> Cache<'a> {
    /// `place` has been checked.
    pub(super) fn new(root: &Path, place: Place<'a>) -> Self {
        let repo = Repo::model(place.repo.to_owned());
        let name = repo.folder_name();
        Self {
            place,
            layout: hf_hub::Cache::new(root.to_owned()).repo(repo),
            folder: root.join(&name),
            locks: root.join(".locks").join(&name),
        }
    }

    /// The file, if it is there in full.
    pub(super) fn find(&self) -> Option<PathBuf> {
        let path = if is_commit(self.place.revision) {
            self.pointer(self.place.revision)
        } else {
            let commit = fs::read_to_string(self.reference()).ok()?;
            let commit = commit.trim();
            if !is_commit(commit) {
                return None;
            }
            self.pointer(commit)
        };
        path.is_file().then_some(path)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where a blob's contents gather until they are complete.
    pub(super) fn part(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.part"))
    }

    fn pointer(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit).join(self.place.file)
    }

    fn reference(&self) -> PathBuf {
        self.folder.join("refs").join(self.place.revision)
    }

    /// Makes the folder for blobs and opens the lock file of one of them, the same that `huggingface_hub` uses.
    pub(super) fn prepare(&self, etag: &str) -> io::Result<File> {
        fs::create_dir_all(self.folder.join("blobs"))?;
        fs::create_dir_all(&self.locks)?;
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.locks.join(format!("{etag}.lock")))
    }

    /// Turns a complete `.part` into the blob. Whoever sees the blob sees all of it, even after a power cut.
    pub(super) fn publish(&self, etag: &str) -> io::Result<()> {
        let part = self.part(etag);
        File::options().write(true).open(&part)?.sync_all()?;
        fs::rename(&part, self.blob(etag))?;
        sync_folder(&self.folder.join("blobs"))
    }

    /// Makes the blob visible under its name in `commit`, and notes that the revision is that commit.
    pub(super) fn link(&self, etag: &str, commit: &str) -> io::Result<PathBuf> {
        let pointer = self.pointer(commit);
        replace(&pointer, |new| {
            // From the pointer's folder up to the repository's: the snapshot, `snapshots`, and the file's own folders.
            let up = "../".repeat(2 + self.place.file.matches('/').count());
            symlink(Path::new(&format!("{up}blobs/{etag}")), new)
                // File systems without symbolic links.
                .or_else(|_| fs::hard_link(self.blob(etag), new))
                .or_else(|_| fs::copy(self.blob(etag), new).map(|_| ()))
        })?;
        if !is_commit(self.place.revision) {
            replace(&self.reference(), |new| fs::write(new, commit))?;
        }
        Ok(pointer)
    }
}

/// Puts a new file in the place of `path` at once, so that nobody sees none or half of one.
fn replace(path: &Path, make: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let new = tempfile::Builder::new()
        .prefix(".new-")
        .make_in(folder, make)?;
    new.into_temp_path().persist(path).map_err(|e| e.error)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

// Other systems cannot open folders; their renames are journalled.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}
