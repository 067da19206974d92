//! The `tronie` executable on a copy of the tiny models that a test may damage.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder with the catalogue, the tiny models and their graphs.
pub struct Workshop {
    folder: TempDir,
}

impl Workshop {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        copy(&root.join("tests/models"), folder.path());
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Replaces text in the catalogue; the text must be there.
    pub fn edit_catalogue(&self, from: &str, to: &str) {
        let path = self.path("models.yaml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from:?} is not in the catalogue");
        std::fs::write(path, text.replacen(from, to, 1)).unwrap();
    }

    /// The command with arguments, run in the folder.
    pub fn tronie(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tronie"));
        command.current_dir(self.folder.path()).args(arguments);
        command.envs(library());
        // What a test leaves behind lies in its folder.
        command.env("TRONIE_CACHE", "off");
        command
    }

    /// `generate` on the tiny model with few steps.
    pub fn generate(&self, arguments: &[&str]) -> Output {
        let common = [
            "generate", "a sailor", "--model", "tiny", "--steps", "4", "--seed", "3",
        ];
        self.tronie(&[&common[..], arguments].concat())
            .output()
            .unwrap()
    }

    /// Checks that a run failed with `code` and a message that has all of `parts`, without panic or leftover.
    pub fn assert_fails(&self, output: &Output, code: i32, parts: &[&str]) {
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(!message.contains("panicked"), "{message}");
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
        let leftovers = self.made_files();
        assert!(leftovers.is_empty(), "left behind: {leftovers:?}");
    }

    /// Pictures, latents and temporary files in the folder and in `out/`.
    pub fn made_files(&self) -> Vec<String> {
        let folders = [self.folder.path().to_owned(), self.path("out")];
        let entries = folders
            .iter()
            .flat_map(std::fs::read_dir)
            .flatten()
            .flatten();
        let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        names
            .filter(|n| {
                [".png", ".part", ".out.safetensors"]
                    .iter()
                    .any(|e| n.ends_with(e))
            })
            .collect()
    }
}

/// What has to be in the environment for ONNX Runtime to be found: the folder is outside the project, so the project's
/// virtual environment has to be named.
pub fn library() -> Option<(&'static str, PathBuf)> {
    let venv = || Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv");
    match std::env::var_os("ORT_DYLIB_PATH") {
        Some(_) => None,
        None => Some(("VIRTUAL_ENV", venv())),
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
