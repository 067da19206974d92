//! How much memory this process takes: what the kernel says at a moment, and the peak between two moments.
//!
//! Anonymous memory is what the process has made itself: activations, copies of weights, the library's own. Pages of
//! mapped weight files are not in it; they are in resident memory as long as the page cache keeps them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two looks at the process's memory.
const INTERVAL: Duration = Duration::from_millis(5);

/// Anonymous memory of this process now, bytes; `None` where the system does not tell (it does on Linux).
pub fn anonymous() -> Option<u64> {
    status("RssAnon:")
}

/// Largest resident memory of this process so far, bytes; `None` where the system does not tell (it does on Linux).
pub fn peak_resident() -> Option<u64> {
    status("VmHWM:")
}

/// A field of the kernel's account of this process, bytes.
fn status(field: &str) -> Option<u64> {
    field_of(&std::fs::read_to_string("/proc/self/status").ok()?, field)
}

fn field_of(status: &str, field: &str) -> Option<u64> {
    let value = status.lines().find_map(|l| l.strip_prefix(field))?;
    let kib = value.trim().strip_suffix("kB")?.trim().parse::<u64>();
    kib.ok().map(|kib| kib * 1024)
}

/// A thread that looks at the process's anonymous memory every few milliseconds, until it is dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    peak: AtomicU64,
    done: AtomicBool,
}

impl Shared {
    fn look(&self) -> Option<u64> {
        let now = anonymous()?;
        self.peak.fetch_max(now, Ordering::Relaxed);
        Some(now)
    }
}

impl Watch {
    /// Starts to look. `None` where the system does not tell, or gives no thread.
    pub fn start() -> Option<Self> {
        let shared = Arc::new(Shared::default());
        shared.look()?;
        let seen = Arc::clone(&shared);
        let look = move || {
            while !seen.done.load(Ordering::Relaxed) {
                seen.look();
                std::thread::park_timeout(INTERVAL);
            }
        };
        let thread = std::thread::Builder::new().name("memory".into());
        Some(Self {
            shared,
            thread: Some(thread.spawn(look).ok()?),
        })
    }

    /// The highest anonymous memory since the last lap, bytes, and that of now, with which the next lap begins.
    pub fn lap(&self) -> (u64, u64) {
        let now = self.shared.look().unwrap_or_default();
        (self.shared.peak.swap(now, Ordering::Relaxed), now)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A thread that only reads a file has nothing to report.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_as_bytes() {
        let status = "VmHWM:\t   12 kB\nRssAnon:\t     4604 kB\nThreads:\t1\n";
        assert_eq!(field_of(status, "RssAnon:"), Some(4604 << 10));
        assert_eq!(field_of(status, "VmHWM:"), Some(12 << 10));
        assert_eq!(field_of(status, "VmSwap:"), None);
        assert_eq!(field_of(status, "Threads:"), None);
    }

    #[test]
    fn a_lap_sees_memory_that_came_and_went() {
        if !cfg!(target_os = "linux") {
            return;
        }
        let watch = Watch::start().unwrap();
        let (_, before) = watch.lap();
        let block = std::hint::black_box(vec![1_u8; 256 << 20]);
        std::thread::sleep(INTERVAL * 20);
        drop(block);
        let (peak, after) = watch.lap();
        assert!(peak > before + (200 << 20), "{before} {peak}");
        assert!(peak > after + (100 << 20), "{peak} {after}");
        assert!(peak_resident() >= Some(peak));
    }
}
