//! One file from the hub into the cache: locked, resumed, verified, and only then visible.
//!
//! Python twin: `huggingface_hub.file_download._download_to_tmp_and_move`, plus the comparison with the hash.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::client::{Client, Fault, Incoming, Remote};
use super::names::is_sha256;
use super::{OnTransfer, Phase, Place, Transfer};
use crate::error::{Error, Result};

const BUFFER: usize = 1 << 18;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const POLL: Duration = Duration::from_millis(200);

/// A transfer and what it needs.
pub(super) struct Job<'a, 'b> {
    pub(super) place: Place<'a>,
    pub(super) cache: &'a Cache<'a>,
    pub(super) client: &'a Client,
    pub(super) retries: u32,
    pub(super) on_transfer: &'a mut OnTransfer<'b>,
}

/// Why the bytes stopped.
enum Stop {
    Fault(Fault),
    Error(Error),
}

impl Job<'_, '_> {
    pub(super) fn run(mut self) -> Result<PathBuf> {
        let remote = self.describe()?;
        let Remote { etag, commit, size } = &remote;
        let cannot = |place: Place<'_>, e: &io::Error| {
            place.error(format!(
                "cannot write to the cache: {e}; HF_HOME can name another folder"
            ))
        };
        let lock = self
            .cache
            .prepare(etag)
            .map_err(|e| cannot(self.place, &e))?;
        self.wait_for(&lock)?;
        let blob = self.cache.blob(etag);
        // There if another process has just fetched it, if another commit has it too, or if we died before the link.
        let there = blob.is_file() && self.verify(&blob, etag, *size)?.is_ok();
        if !there {
            self.download(&remote)?;
            self.cache
                .publish(etag)
                .map_err(|e| cannot(self.place, &e))?;
        }
        let path = self
            .cache
            .link(etag, commit)
            .map_err(|e| cannot(self.place, &e))?;
        // Closing the file would unlock it too; this says until when it has to be open.
        drop(lock);
        Ok(path)
    }

    fn describe(&mut self) -> Result<Remote> {
        let mut failures = 0;
        loop {
            match self.client.describe(self.place) {
                Ok(remote) => return Ok(remote),
                Err(fault) => self.pause(fault, &mut failures)?,
            }
        }
    }

    /// Waits before another try, or gives up.
    fn pause(&self, fault: Fault, failures: &mut u32) -> Result<()> {
        match fault {
            Fault::Passing(_, wait) if *failures < self.retries => {
                std::thread::sleep(wait.unwrap_or(FIRST_WAIT * (1 << (*failures).min(6))));
                *failures += 1;
                Ok(())
            }
            Fault::Passing(reason, _) | Fault::Lasting(reason) => Err(self.place.error(reason)),
            Fault::Range => Err(self.place.error("the server has no bytes to send")),
        }
    }

    fn wait_for(&mut self, lock: &File) -> Result<()> {
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) => {
                    self.tell(Phase::Waiting, 0, None)?;
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::Error(e)) => {
                    return Err(self.place.error(format!(
                        "the cache's file system cannot lock files ({e}): set HF_HOME to a folder on another disk"
                    )));
                }
            }
        }
    }

    fn tell(&mut self, phase: Phase, done: u64, total: Option<u64>) -> Result<()> {
        let Place { repo, file, .. } = self.place;
        (self.on_transfer)(&Transfer {
            repo,
            file,
            phase,
            done,
            total,
        })
    }

    /// Fills the `.part` file until it is complete and verified.
    fn download(&mut self, remote: &Remote) -> Result<()> {
        let part = self.cache.part(&remote.etag);
        let resumed = fs::metadata(&part).is_ok_and(|meta| meta.len() > 0);
        self.receive(&part, remote.size)?;
        let Err(reason) = self.verify(&part, &remote.etag, remote.size)? else {
            return Ok(());
        };
        let mut reason = self.discard(&part, reason)?;
        if resumed {
            // What an earlier run left was bad; a whole transfer has not been tried.
            self.receive(&part, remote.size)?;
            match self.verify(&part, &remote.etag, remote.size)? {
                Ok(()) => return Ok(()),
                Err(again) => reason = self.discard(&part, again)?,
            }
        }
        Err(self.place.error(format!(
            "{reason}; the damaged download was deleted, try again"
        )))
    }

    fn discard(&self, part: &Path, reason: String) -> Result<String> {
        fs::remove_file(part).map_err(|e| {
            self.place
                .error(format!("{reason}, and {} stays: {e}", part.display()))
        })?;
        Ok(reason)
    }

    fn receive(&mut self, part: &Path, size: Option<u64>) -> Result<()> {
        let mut failures = 0;
        let mut before = 0;
        loop {
            let fault = match self.pour(part, size) {
                Ok(()) => return Ok(()),
                Err(Stop::Error(error)) => return Err(error),
                Err(Stop::Fault(fault)) => fault,
            };
            let have = fs::metadata(part).map_or(0, |meta| meta.len());
            if have > before {
                failures = 0;
            }
            before = have;
            match fault {
                Fault::Range if have > 0 => {
                    self.discard(part, "the server has less than was kept".into())?;
                }
                fault => self.pause(fault, &mut failures)?,
            }
        }
    }

    /// One request's bytes onto the end of `part`.
    fn pour(&mut self, part: &Path, size: Option<u64>) -> Result<(), Stop> {
        let place = self.place;
        let disk = |e| Stop::Error(cannot_write(place, part, &e));
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(part)
            .map_err(disk)?;
        let mut have = file.metadata().map_err(disk)?.len();
        if size.is_some_and(|size| have > size) {
            file.set_len(0).map_err(disk)?;
            have = 0;
        }
        if size == Some(have) && have > 0 {
            return Ok(());
        }
        let incoming = self.client.fetch(place, have).map_err(Stop::Fault)?;
        if let (Some(size), Some(total)) = (size, incoming.total)
            && size != total
        {
            return Err(lasting(format!(
                "the hub says {size} bytes, and {total} are sent: the file is just changing"
            )));
        }
        if incoming.start != have {
            // The server ignored the range. Nothing else can start in the right place.
            if incoming.start != 0 {
                let start = incoming.start;
                return Err(lasting(format!(
                    "bytes from {have} on were asked for, and from {start} on are sent"
                )));
            }
            file.set_len(0).map_err(disk)?;
        }
        let incoming = Incoming {
            total: size.or(incoming.total),
            ..incoming
        };
        self.drain(incoming, |bytes| {
            file.write_all(bytes)
                .map_err(|e| cannot_write(place, part, &e))
        })
    }

    /// Hands all of an answer's bytes to `write`.
    fn drain(
        &mut self,
        incoming: Incoming,
        mut write: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<(), Stop> {
        let Incoming {
            start: mut have,
            total,
            mut body,
        } = incoming;
        let mut buffer = vec![0; BUFFER];
        loop {
            self.tell(Phase::Receiving, have, total)
                .map_err(Stop::Error)?;
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken_off(total, have, &e.to_string())),
            };
            have += count as u64;
            if total.is_some_and(|total| have > total) {
                return Err(lasting("more bytes are sent than the file has".into()));
            }
            write(&buffer[..count]).map_err(Stop::Error)?;
        }
        match total {
            Some(total) if have < total => {
                Err(broken_off(Some(total), have, "the connection was closed"))
            }
            _ => Ok(()),
        }
    }

    /// Compares a file with what the hub says of it. The inner error is the mismatch.
    fn verify(&mut self, path: &Path, etag: &str, size: Option<u64>) -> Result<Result<(), String>> {
        let place = self.place;
        let disk = |e: io::Error| place.error(format!("cannot read {}: {e}", path.display()));
        let mut file = File::open(path).map_err(disk)?;
        let found = file.metadata().map_err(disk)?.len();
        if let Some(size) = size
            && size != found
        {
            return Ok(Err(format!(
                "damaged in transfer: {size} bytes expected, {found} arrived"
            )));
        }
        if !is_sha256(etag) {
            return Ok(if size.is_some() {
                Ok(())
            } else {
                Err("the server says neither size nor SHA-256".into())
            });
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        let mut done = 0;
        loop {
            self.tell(Phase::Verifying, done, Some(found))?;
            let count = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(disk(e)),
            };
            hash.update(&buffer[..count]);
            done += count as u64;
        }
        let actual = hex(&hash.finalize());
        if actual == etag {
            return Ok(Ok(()));
        }
        Ok(Err(format!(
            "damaged in transfer: SHA-256 {etag} expected, {actual} arrived"
        )))
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn lasting(reason: String) -> Stop {
    Stop::Fault(Fault::Lasting(reason))
}

fn cannot_write(place: Place<'_>, part: &Path, error: &io::Error) -> Error {
    place.error(format!(
        "cannot write {}: {error}; what has arrived is kept",
        part.display()
    ))
}

fn broken_off(total: Option<u64>, have: u64, cause: &str) -> Stop {
    let expected = total.map_or_else(|| "more".to_owned(), |total| format!("{total}"));
    let reason = format!(
        "truncated: {expected} bytes expected, {have} arrived ({cause}); run again to resume"
    );
    Stop::Fault(Fault::Passing(reason, None))
}
