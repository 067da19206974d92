//! One configuration in a process of its own: a folder with the job goes in, a report and a picture come out.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::bench::{Job, Measured, measure};
use crate::cli::args::BenchJobArgs;
use crate::cli::generate::stop_on_ctrl_c;
use crate::error::{Error, Result};
use crate::files::read_input;
use crate::progress::Cancel;

const JOB: &str = "job.json";
const REPORT: &str = "report.json";
const PICTURE: &str = "picture.png";
const PROFILES: &str = "profiles";
const STDERR: &str = "stderr.txt";
/// Jobs and reports are some pages of text.
const MAX_BYTES: u64 = 16 << 20;
/// Time between two looks at whether the process has ended.
const INTERVAL: Duration = Duration::from_millis(20);

/// What the process says.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Report {
    /// It was measured.
    Measured(Box<Measured>),
    /// It could not be measured.
    Failed {
        /// As [`Error::code`].
        code: u8,
        /// The error's message.
        reason: String,
    },
}

/// Measures `job` in a new process.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Output`] when the temporary folder cannot be written or the process not started. What
/// goes wrong in the process is a report.
pub(super) fn run(job: &Job, cancel: &Cancel) -> Result<(Report, Option<RgbImage>)> {
    let folder = tempfile::tempdir().map_err(|e| unwritable(&std::env::temp_dir(), e))?;
    let path = |name| folder.path().join(name);
    write_json(&path(JOB), job)?;
    let stderr = File::create(path(STDERR)).map_err(|e| unwritable(&path(STDERR), e))?;
    let executable = std::env::current_exe().map_err(|e| unwritable(folder.path(), e))?;
    let mut command = Command::new(executable);
    command.arg("bench-job").arg(folder.path());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(stderr).spawn();
    let status = wait(child.map_err(|e| unwritable(folder.path(), e))?, cancel)?;
    if !path(REPORT).exists() {
        let said = std::fs::read_to_string(path(STDERR)).unwrap_or_default();
        return Ok((died(status, &said), None));
    }
    let report = read_json(&path(REPORT))?;
    let picture = image::open(path(PICTURE)).ok().map(|p| p.to_rgb8());
    Ok((report, picture))
}

/// `tronie bench-job`: the other side.
pub(in crate::cli) fn job(args: &BenchJobArgs) -> Result<()> {
    let path = |name| args.folder.join(name);
    let job = read_json::<Job>(&path(JOB))?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    std::fs::create_dir(path(PROFILES)).map_err(|e| unwritable(&path(PROFILES), e))?;
    let report = match measure(&job, &path(PROFILES), &cancel) {
        Ok((measured, picture)) => {
            let saved = picture.save(path(PICTURE));
            saved.map_err(|e| unwritable(&path(PICTURE), std::io::Error::other(e)))?;
            Report::Measured(Box::new(measured))
        }
        Err(error) => Report::Failed {
            code: error.code(),
            reason: error.to_string(),
        },
    };
    write_json(&path(REPORT), &report)
}

/// Waits for the process, and ends it when the user wants to stop.
fn wait(mut child: Child, cancel: &Cancel) -> Result<ExitStatus> {
    let fail = |e| unwritable(Path::new("bench-job"), e);
    loop {
        if let Some(status) = child.try_wait().map_err(fail)? {
            return if cancel.is_cancelled() {
                Err(Error::Cancelled { step: 0 })
            } else {
                Ok(status)
            };
        }
        if cancel.is_cancelled() {
            // It may have ended meanwhile, which is as well.
            let _ = child.kill();
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The report of a process that made none.
fn died(status: ExitStatus, said: &str) -> Report {
    let last = said.lines().next_back().unwrap_or("it said nothing");
    Report::Failed {
        // Of the runtime's kind: nothing of tronie's own ends a process without a word.
        code: 5,
        reason: format!(
            "its process ended with {status}: {last}; a process that the system kills has usually run out of memory"
        ),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(value).map_err(|e| unwritable(path, e.into()))?;
    std::fs::write(path, bytes).map_err(|e| unwritable(path, e))
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let bytes = read_input(path, MAX_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Input {
        path: path.to_owned(),
        reason: e.to_string(),
    })
}

fn unwritable(path: &Path, source: std::io::Error) -> Error {
    Error::Output {
        path: PathBuf::from(path),
        source,
    }
}
