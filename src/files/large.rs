//! Gigabytes on their way to a file, past the system's page cache where there is a way.
//!
//! What is written through the cache pushes the mapped weights out of it, and costs the system a page of memory every
//! 4 KiB: on the machine of `benches/README.md` seven times the disk's own time. The file is the same either way.
//!
//! No Python twin: safetensors writes through the cache.

use std::fs::File;
use std::io::{self, ErrorKind, Seek as _, SeekFrom, Write};
use std::path::Path;

/// What addresses, places and lengths are multiples of where the cache is passed by: no disk in use has larger sectors.
const SECTOR: usize = 4096;
/// Bytes that are written at a time.
const PIECE: usize = 16 << 20;

/// Collects what is written, and passes it on in large pieces.
pub(super) struct Large<'f> {
    cached: &'f File,
    /// The same file, past the cache; `None` where that cannot be.
    direct: Option<File>,
    buffer: Vec<u8>,
    /// Where the buffer's first aligned byte is.
    start: usize,
    /// Bytes from there on that are not written yet.
    filled: usize,
    /// Bytes of the file.
    written: u64,
}

impl<'f> Large<'f> {
    /// Writes to an empty file, which is at `path`.
    pub(super) fn new(cached: &'f File, path: &Path) -> Self {
        let buffer = vec![0; PIECE + SECTOR];
        let start = buffer.as_ptr().align_offset(SECTOR);
        let aligned = start <= SECTOR;
        Self {
            cached,
            direct: open_direct(path).filter(|_| aligned),
            buffer,
            start: if aligned { start } else { 0 },
            filled: 0,
            written: 0,
        }
    }

    /// Writes the first `count` bytes of the buffer.
    fn pour(&mut self, count: usize) -> io::Result<()> {
        let mut done = 0;
        while done < count {
            let rest = &self.buffer[self.start + done..self.start + count];
            let mut file = self.direct.as_ref().unwrap_or(self.cached);
            file.seek(SeekFrom::Start(self.written))?;
            match file.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    done += written;
                    self.written += written as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The file system, or what is left after a short write, cannot pass the cache by.
                Err(e) if e.kind() == ErrorKind::InvalidInput && self.direct.is_some() => {
                    self.direct = None;
                }
                Err(e) => return Err(e),
            }
        }
        self.buffer
            .copy_within(self.start + count..self.start + self.filled, self.start);
        self.filled -= count;
        Ok(())
    }
}

impl Write for Large<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == PIECE {
            self.pour(PIECE)?;
        }
        let count = bytes.len().min(PIECE - self.filled);
        let first = self.start + self.filled;
        self.buffer[first..first + count].copy_from_slice(&bytes[..count]);
        self.filled += count;
        Ok(count)
    }

    /// Ends the file: what fills no sector goes through the cache, and so would all that came after.
    fn flush(&mut self) -> io::Result<()> {
        self.pour(self.filled / SECTOR * SECTOR)?;
        if self.filled > 0 {
            self.direct = None;
        }
        self.pour(self.filled)
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    options.write(true).custom_flags(libc::O_DIRECT);
    options.open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of pieces of some lengths, and what it should hold.
    fn written(lengths: &[usize], direct: bool) -> (Vec<u8>, Vec<u8>) {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut large = Large::new(file.as_file(), file.path());
        large.direct = large.direct.filter(|_| direct);
        let mut expected = Vec::new();
        for (seed, &length) in lengths.iter().enumerate() {
            let part: Vec<u8> = (0..length).map(|at| (at * 31 + seed) as u8).collect();
            large.write_all(&part).unwrap();
            expected.extend(part);
        }
        large.flush().unwrap();
        (std::fs::read(file.path()).unwrap(), expected)
    }

    #[test]
    fn every_byte_arrives_in_its_place() {
        for direct in [true, false] {
            for lengths in [
                &[][..],
                &[0, 1],
                &[SECTOR],
                &[SECTOR - 1, 2],
                &[PIECE],
                &[7, PIECE, 5],
                &[PIECE + SECTOR + 1, PIECE - 1, 3 * SECTOR],
            ] {
                let (found, expected) = written(lengths, direct);
                assert!(found == expected, "{lengths:?}, direct {direct}");
            }
        }
    }

    #[test]
    fn what_comes_after_the_end_was_written_is_not_lost() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut large = Large::new(file.as_file(), file.path());
        large.write_all(&[1; 5]).unwrap();
        large.flush().unwrap();
        large.write_all(&[2; SECTOR]).unwrap();
        large.flush().unwrap();
        let expected = [vec![1; 5], vec![2; SECTOR]].concat();
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}
