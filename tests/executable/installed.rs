//! The executable alone: no catalogue, graph or model lies beside it, above it or in the working directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::workshop::library;

const PAINT: &[&str] = &[
    "generate",
    "a sailor",
    "--model",
    "demo",
    "--refiner",
    "demo-refiner",
    "--steps",
    "6",
    "--seed",
    "3",
];

/// A copy of the executable, and a folder to run it in.
struct Installed {
    executable: TempDir,
    folder: TempDir,
}

impl Installed {
    fn new() -> Self {
        let executable = tempfile::tempdir().unwrap();
        std::fs::copy(
            env!("CARGO_BIN_EXE_tronie"),
            executable.path().join("tronie"),
        )
        .unwrap();
        Self {
            executable,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command with arguments; what the environment says of catalogues and the hub is taken away.
    fn tronie(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.executable.path().join("tronie"));
        command
            .current_dir(self.folder.path())
            .args(arguments)
            .envs(library())
            .env_remove("TRONIE_MODELS")
            .env("HF_HUB_CACHE", self.path("cache"))
            .env("HF_HUB_OFFLINE", "1");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let output = self.tronie(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }

    fn says(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.run(arguments).stdout).unwrap()
    }
}

fn pixels(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().to_rgb8().into_raw()
}

#[test]
fn every_model_of_the_repositorys_catalogue_is_offered_and_none_is_broken() {
    let tronie = Installed::new();
    for command in ["models", "doctor"] {
        let said = tronie.says(&[command]);
        assert!(said.contains("built-in catalogue"), "{said}");
        let state = |model: &str| {
            let mut lines = said.lines().map(str::trim_start);
            let line = lines.find(|l| l.split_whitespace().next() == Some(model));
            line.unwrap_or_else(|| panic!("{model}: {said}"))
                .rsplit_once("; ")
                .unwrap()
                .1
                .to_owned()
        };
        assert_eq!([state("demo"), state("demo-refiner")], ["ready", "ready"]);
        for (model, files) in [
            ("sdxl-base", 8),
            ("sdxl-refiner", 5),
            ("sdxl-lightning-4step", 8),
        ] {
            let wanted = format!("{files} files to download");
            assert!(state(model).starts_with(&wanted), "{said}");
        }
        let both = "from ByteDance/SDXL-Lightning and stabilityai/stable-diffusion-xl-base-1.0";
        assert!(state("sdxl-lightning-1step").ends_with(both), "{said}");
        let lora = "to download on first use from ByteDance/SDXL-Lightning";
        assert_eq!(state("lightning-8step"), lora);
    }
}

#[test]
fn it_paints_what_the_repository_paints_and_repeats_it() {
    let tronie = Installed::new();
    let catalogue = concat!(env!("CARGO_MANIFEST_DIR"), "/models.yaml");
    let from_disk = ["--models", catalogue, "--output", "disk.png"];
    tronie.run(&[PAINT, &from_disk].concat());
    tronie.run(&[PAINT, &["--output", "a.png"]].concat());
    assert_eq!(
        pixels(&tronie.path("a.png")),
        pixels(&tronie.path("disk.png"))
    );

    tronie.run(&["generate", "--request", "a.png", "--output", "b.png"]);
    let bytes = |name| std::fs::read(tronie.path(name)).unwrap();
    assert_eq!(bytes("a.png"), bytes("b.png"));
    assert!(tronie.says(&["inspect", "a.png"]).contains("demo-refiner"));
}

#[test]
fn without_a_model_the_demo_paints_because_its_files_are_here() {
    let tronie = Installed::new();
    let few = ["--steps", "2", "--seed", "3", "--output", "a.png"];
    let output = tronie.run(&[&["generate", "a sailor"], &few[..]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no --model: painting with demo"), "{said}");
    assert!(
        tronie
            .says(&["inspect", "a.png"])
            .contains(r#""model": "demo""#)
    );
}

#[test]
fn a_model_that_is_not_built_in_is_refused_with_the_known_ones() {
    let tronie = Installed::new();
    let output = tronie
        .tronie(&["generate", "x", "--model", "nobody"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    let parts = ["`nobody`", "built-in catalogue", "demo", "sdxl-base"];
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

#[test]
fn a_catalogue_on_disk_goes_before_the_built_in_one_which_can_be_named() {
    let tronie = Installed::new();
    let broken = |path: PathBuf| std::fs::write(path, "format: 1\nmodels: {}\n").unwrap();
    let refusal = |catalogue: &str| {
        let output = tronie.tronie(&["models"]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains("no models defined"), "{message}");
        assert!(message.contains(catalogue), "{message}");
    };
    let beside = tronie.executable.path().join("models.yaml");
    broken(beside.clone());
    refusal(&beside.canonicalize().unwrap().to_string_lossy());
    broken(tronie.path("models.yaml"));
    refusal("error: models.yaml");

    for named in [
        &["--models", "built-in"][..],
        &["--models", "../nowhere/models.yaml"],
    ] {
        let output = tronie
            .tronie(&[&["models"], named].concat())
            .output()
            .unwrap();
        assert_eq!(output.status.success(), named[1] == "built-in");
    }
    let mut by_environment = tronie.tronie(&["models"]);
    let output = by_environment.env("TRONIE_MODELS", "built-in").output();
    assert!(output.unwrap().status.success());

    let arguments = ["--models", "built-in", "--output", "a.png"];
    tronie.run(&[PAINT, &arguments].concat());
    tronie.run(&["generate", "--request", "a.png", "--output", "b.png"]);
    let bytes = |name| std::fs::read(tronie.path(name)).unwrap();
    assert_eq!(bytes("a.png"), bytes("b.png"));
}

#[test]
fn a_catalogue_above_the_executable_is_not_looked_for() {
    let tronie = Installed::new();
    let inner = tronie.path("bin");
    std::fs::create_dir(&inner).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_tronie"), inner.join("tronie")).unwrap();
    std::fs::write(tronie.path("models.yaml"), "somebody: else's\n").unwrap();
    let output = Command::new(inner.join("tronie"))
        .arg("models")
        .current_dir(&inner)
        .env_remove("TRONIE_MODELS")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("built-in catalogue\n"), "{said}");
}
