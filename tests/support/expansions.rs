//! A folder of weight files and a cache for their expansions.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tronie::weights::{Entry, Expanding, ExpansionCache, Weights};

use crate::safetensors_file::{f32_bytes, well_formed};

/// Where a test works. The cache expands everything that is f16 or bf16.
pub struct Shop {
    pub folder: TempDir,
    pub cache: ExpansionCache,
}

/// The kinds of [`Expanding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Hashing,
    Waiting,
    Writing,
    Other,
}

impl Seen {
    pub fn of(event: &Expanding<'_>) -> Self {
        match event {
            Expanding::Hashing { .. } => Self::Hashing,
            Expanding::Waiting { .. } => Self::Waiting,
            Expanding::Writing { .. } => Self::Writing,
            _ => Self::Other,
        }
    }
}

impl Shop {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let cache = ExpansionCache::at(folder.path().join("cache/weights")).with_smallest(1);
        Self { folder, cache }
    }

    pub fn saved(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The weights of a file, expanded, and what went on, each kind once.
    pub fn expanded(&self, file: &Path) -> (Weights, Vec<Seen>) {
        let mut weights = Weights::open(&[file.to_owned()]).unwrap();
        let mut seen = Vec::new();
        self.cache
            .expand(&mut weights, ["h", "b"], &mut |event| {
                seen.push(Seen::of(&event));
                Ok(())
            })
            .unwrap();
        seen.dedup();
        (weights, seen)
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.cache.entries().unwrap()
    }
}

/// A file with all f16 and all bf16 patterns, `h` and `b` of `[256, 256]`, and two tensors that are neither.
pub fn patterns() -> Vec<u8> {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    well_formed(
        &[
            ("f", "F32", &[2], &f32_bytes(&[1.5, -2.5])),
            ("i", "I64", &[1], &[0; 8]),
            ("h", "F16", &[256, 256], &all),
            ("b", "BF16", &[256, 256], &all),
        ],
        0,
    )
}
