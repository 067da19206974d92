//! Writes files so that they appear whole or not at all.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// A file whose content is complete but not yet in its place. Dropped without [`Pending::publish`], it leaves nothing.
#[derive(Debug)]
pub struct Pending {
    temporary: NamedTempFile,
    target: PathBuf,
}

/// Writes `target`'s content to a temporary file beside it.
///
/// # Errors
/// [`Error::Output`] when the folder cannot be written, or `fill` fails.
pub fn write_pending(
    target: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<Pending> {
    let fail = |source| Error::Output {
        path: target.to_owned(),
        source,
    };
    if target.is_dir() {
        return Err(fail(std::io::Error::new(
            std::io::ErrorKind::IsADirectory,
            "is a folder; name a file in it",
        )));
    }
    let folder = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(fail)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tronie-").suffix(".part");
    #[cfg(unix)]
    {
        // A temporary file is private by default; a result has the permissions that the user's umask gives any file.
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut temporary = builder.tempfile_in(folder).map_err(fail)?;
    let mut buffered = BufWriter::new(temporary.as_file_mut());
    fill(&mut buffered)
        .and_then(|()| buffered.flush())
        .map_err(fail)?;
    drop(buffered);
    temporary.as_file().sync_all().map_err(fail)?;
    Ok(Pending {
        temporary,
        target: target.to_owned(),
    })
}

impl Pending {
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
