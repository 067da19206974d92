//! Writes files so that they appear whole or not at all; reads files from the user with a limit.

mod large;

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use large::Large;
use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// A file whose content is complete but not yet in its place. Dropped without [`Pending::publish`], it leaves nothing.
#[derive(Debug)]
pub struct Pending {
    temporary: NamedTempFile,
    target: PathBuf,
}

/// Where a result lands: through a link, to the file it names. Only a regular file is replaced.
fn landing(target: &Path) -> std::io::Result<PathBuf> {
    let refuse = |kind, reason| Err(std::io::Error::new(kind, reason));
    match std::fs::metadata(target) {
        Ok(meta) if meta.is_dir() => {
            refuse(ErrorKind::IsADirectory, "is a folder; name a file in it")
        }
        Ok(meta) if !meta.is_file() => refuse(
            ErrorKind::InvalidInput,
            "is a device or pipe; name an ordinary file",
        ),
        Ok(_) => target.canonicalize(),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(target.to_owned()),
        Err(e) => Err(e),
    }
}

fn folder_of(target: &Path) -> &Path {
    target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Whether a result could be written to `target`. Leaves nothing behind, not even the folders on the way.
///
/// # Errors
/// [`Error::Output`] with the reason.
pub fn check_writable(target: &Path) -> Result<()> {
    let fail = |source| Error::Output {
        path: target.to_owned(),
        source,
    };
    let landing = landing(target).map_err(fail)?;
    tempfile::tempfile_in(existing(folder_of(&landing)))
        .map(drop)
        .map_err(fail)
}

/// The folder, or the first above it that is there.
fn existing(folder: &Path) -> &Path {
    let mut above = folder.ancestors();
    above.find(|p| p.exists()).unwrap_or(Path::new("."))
}

/// Free bytes on the disk of a folder, which need not exist yet. A file system that does not tell may have enough.
pub(crate) fn free_space(folder: &Path) -> u64 {
    fs4::available_space(existing(folder)).unwrap_or(u64::MAX)
}

/// [`free_space`] where `target` lands.
pub(crate) fn free_space_for(target: &Path) -> u64 {
    let landing = landing(target).unwrap_or_else(|_| target.to_owned());
    free_space(folder_of(&landing))
}

/// The bytes of an ordinary file of at most `limit` bytes.
///
/// # Errors
/// [`Error::Input`] when it cannot be read, is a device or pipe, or is larger.
pub fn read_input(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let fail = |reason: String| Error::Input {
        path: path.to_owned(),
        reason,
    };
    let meta = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?;
    if !meta.is_file() {
        return Err(fail("is not an ordinary file".into()));
    }
    if meta.len() > limit {
        return Err(fail(format!(
            "has {} bytes; at most {limit} are expected",
            meta.len()
        )));
    }
    std::fs::read(path).map_err(|e| fail(e.to_string()))
}

/// Writes `target`'s content to a temporary file beside it.
///
/// # Errors
/// [`Error::Output`] when the folder cannot be written, or `fill` fails.
pub fn write_pending(
    target: &Path,
    fill: impl FnOnce(&mut (dyn Write + Send)) -> std::io::Result<()>,
) -> Result<Pending> {
    pending(target, |file, _| {
        let mut buffered = BufWriter::new(file);
        fill(&mut buffered)?;
        buffered.flush()
    })
}

/// As [`write_pending`], for gigabytes: past the system's cache of files where there is a way, so that they push nothing
/// out of it.
///
/// # Errors
/// As [`write_pending`].
pub(crate) fn write_large(
    target: &Path,
    fill: impl FnOnce(&mut (dyn Write + Send)) -> std::io::Result<()>,
) -> Result<Pending> {
    pending(target, |file, path| {
        let mut large = Large::new(file, path);
        fill(&mut large)?;
        large.flush()
    })
}

fn pending(
    target: &Path,
    fill: impl FnOnce(&File, &Path) -> std::io::Result<()>,
) -> Result<Pending> {
    let fail = |source| Error::Output {
        path: target.to_owned(),
        source,
    };
    let target = &landing(target).map_err(fail)?;
    let folder = folder_of(target);
    std::fs::create_dir_all(folder).map_err(fail)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tronie-").suffix(".part");
    #[cfg(unix)]
    {
        // A temporary file is private by default; a result has the permissions that the user's umask gives any file.
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = builder.tempfile_in(folder).map_err(fail)?;
    fill(temporary.as_file(), temporary.path()).map_err(fail)?;
    temporary.as_file().sync_all().map_err(fail)?;
    Ok(Pending {
        temporary,
        target: target.to_owned(),
    })
}

impl Pending {
    /// Where its content is for now.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Puts the file in its place, over whatever was there.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub fn publish(self) -> Result<()> {
        let target = self.target;
        self.temporary.persist(&target).map_err(|e| Error::Output {
            path: target,
            source: e.error,
        })?;
        Ok(())
    }
}
