//! How much memory a run may take: the modes, and which one the machine's free memory allows; and how much it takes.

mod usage;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use usage::{Watch, anonymous, peak_resident};

use crate::error::{Error, Result};

/// Bytes that networks need per pixel of the picture beside their weights: SDXL's decoder, the hungriest, takes about
/// 3 GiB for each million px.
const ACTIVATIONS_PER_PX: u64 = 3 << 10;
/// Bytes of everything else: ONNX Runtime itself, tokenizers, pictures.
const OVERHEAD: u64 = 512 << 20;

/// What a pipeline trades between memory and speed. The picture is the same to the last bits in `Balanced` and `Fast`;
/// `Low` decodes in tiles, which shows in numbers and hardly to the eye.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryMode {
    /// Weights stay in the page cache, one network is resident at a time, activations are given back at once, and the
    /// VAE works in tiles.
    Low,
    /// One network is resident at a time; convolutions keep their weights in a faster layout.
    Balanced,
    /// All weights are copied into the fastest layout, and every network of a request stays loaded for the next one.
    Fast,
}

impl MemoryMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Low, Self::Balanced, Self::Fast];

    /// The name on the command line and in requests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Balanced => "balanced",
            Self::Fast => "fast",
        }
    }

    /// Whether networks stay loaded between the stages and requests of a pipeline.
    pub const fn keeps_networks(self) -> bool {
        matches!(self, Self::Fast)
    }
}

impl fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for MemoryMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|m| m.name() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::name).join(", ");
                Error::request("memory", format!("`{name}` is not known; known: {known}"))
            })
    }
}

/// What a request's networks need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Bytes of all weights as f32.
    pub weights: u64,
    /// Bytes of the largest network's weights as f32.
    pub largest: u64,
    /// Bytes of the weights that LoRAs change, which lie in no file that the system could drop.
    pub changed: u64,
    /// The same of the network that has most of them.
    pub most_changed: u64,
    /// Pixels that are worked on at once.
    pub pixels: u64,
}

impl Need {
    /// Counts a network in: bytes of its weights, and of those among them that LoRAs change.
    pub fn add(&mut self, weights: u64, changed: u64) {
        self.weights += weights;
        self.largest = self.largest.max(weights);
        self.changed += changed;
        self.most_changed = self.most_changed.max(changed);
    }

    /// Bytes that a mode wants to be free, the page cache that keeps it at speed included.
    pub const fn of(&self, mode: MemoryMode) -> u64 {
        let weights = match mode {
            MemoryMode::Low => self.most_changed,
            MemoryMode::Balanced => self.largest,
            // Beside the copies in the fastest layout.
            MemoryMode::Fast => self.weights + self.changed,
        };
        weights + self.pixels * ACTIVATIONS_PER_PX + OVERHEAD
    }

    /// The fastest mode that fits into `available` bytes.
    pub fn fastest_in(&self, available: u64) -> MemoryMode {
        let fitting = MemoryMode::ALL.into_iter().rev();
        fitting
            .into_iter()
            .find(|mode| self.of(*mode) <= available)
            .unwrap_or(MemoryMode::Low)
    }
}

/// Bytes that this process can still take: the machine's available memory, or what is left of its container's share if
/// that is less. `None` where the system does not tell.
pub fn available() -> Option<u64> {
    use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System};
    let mut system = System::new().ok()?;
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let pid = sysinfo::get_current_pid().ok()?;
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[pid]),
        false,
        ProcessRefreshKind::nothing(),
    );
    let machine = system.available_memory();
    let limits = system
        .process(pid)
        .and_then(sysinfo::Process::cgroup_limits);
    // What counts against the share beside `rss` is page cache, which the kernel takes back.
    let share = limits.map_or(u64::MAX, |l| l.total_memory.saturating_sub(l.rss));
    match machine.min(share) {
        0 => None,
        bytes => Some(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SDXL_WITH_REFINER: Need = Need {
        weights: 25 << 30,
        largest: 10 << 30,
        changed: 0,
        most_changed: 0,
        pixels: 1 << 20,
    };

    #[test]
    fn the_mode_falls_with_the_free_memory() {
        use MemoryMode::{Balanced, Fast, Low};
        let chosen = [64, 24, 14, 12, 3, 0].map(|gib| SDXL_WITH_REFINER.fastest_in(gib << 30));
        assert_eq!(chosen, [Fast, Balanced, Balanced, Low, Low, Low]);
    }

    #[test]
    fn changed_weights_take_memory_in_every_mode_that_could_do_without() {
        use MemoryMode::{Balanced, Fast, Low};
        let mut need = SDXL_WITH_REFINER;
        need.add(1 << 30, 1 << 30);
        need.add(9 << 30, 8 << 30);
        let more = |mode| need.of(mode) - SDXL_WITH_REFINER.of(mode);
        assert_eq!([Low, Balanced, Fast].map(more), [8 << 30, 0, 19 << 30]);
    }

    #[test]
    fn this_machine_tells_its_memory() {
        if cfg!(target_os = "linux") {
            assert!(available().unwrap() > 16 << 20);
        }
    }

    #[test]
    fn an_unknown_mode_lists_the_known_ones() {
        let message = "tiny".parse::<MemoryMode>().unwrap_err().to_string();
        assert!(message.contains("low, balanced, fast"), "{message}");
    }
}
