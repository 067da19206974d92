//! Lines to the user. A closed pipe is the reader's choice, not an error.

use std::io::Write as _;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// A result, on stdout.
pub(super) fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Output {
            path: PathBuf::from("stdout"),
            source: e,
        }),
        _ => Ok(()),
    }
}

/// What happens meanwhile, on stderr. When nobody can hear it, the work goes on.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
