//! Where ONNX Runtime's library is, and the one environment it gives a process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort::environment::Environment;

use crate::error::{Error, Result};

/// What every "not found" ends with.
const HOW_TO_GET: &str = "get it with `pip install onnxruntime` (a project's .venv is found by itself), or point --ort-lib or \
     ORT_DYLIB_PATH at the library";

/// ONNX Runtime's shared library, loaded once a process.
///
/// It is looked for in this order: the explicit path (file or folder), `ORT_DYLIB_PATH`, beside the executable, the
/// active virtual environment, a `.venv` in the working directory or the executable's folder or any folder above them.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    version: String,
    environment: Environment,
}

impl Library {
    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// ONNX Runtime's description of its build.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }

    pub(super) fn load(explicit: Option<&Path>) -> Result<&'static Self> {
        static LOADED: OnceLock<Library> = OnceLock::new();
        static LOADING: Mutex<()> = Mutex::new(());
        // ONNX Runtime allows one environment a process, so two threads must not race to make it.
        let _guard = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = LOADED.get() {
            return match explicit {
                Some(path) if find(Some(path))? != loaded.path => Err(Error::Library {
                    reason: format!(
                        "{} is already loaded in this process; {} cannot be loaded beside it",
                        loaded.path.display(),
                        path.display()
                    ),
                }),
                _ => Ok(loaded),
            };
        }
        let loaded = open(find(explicit)?)?;
        Ok(LOADED.get_or_init(|| loaded))
    }
}

fn open(path: PathBuf) -> Result<Library> {
    silence_telemetry();
    let builder = ort::init_from(&path).map_err(|e| Error::Library {
        reason: refusal(&path, &e),
    })?;
    let environment = builder
        .with_name("tronie")
        .with_telemetry(false)
        .build()
        .map_err(|e| Error::Library {
            reason: format!("{}: {e}", path.display()),
        })?;
    let version = ort::info().to_owned();
    Ok(Library {
        path,
        version,
        environment,
    })
}

/// Why a file is not a library that this engine can use.
fn refusal(path: &Path, error: &ort::LoadDynamicError) -> String {
    let path = path.display();
    match error {
        ort::LoadDynamicError::BadVersion { version_str, .. } => {
            let oldest = ort::MINOR_VERSION;
            format!(
                "{path} is version {version_str}, but 1.{oldest} or newer is needed; {HOW_TO_GET}"
            )
        }
        other => format!("{path}: {other}; {HOW_TO_GET}"),
    }
}

/// Microsoft's wheels report usage from the moment the library initialises; only this variable stops that early enough.
#[allow(unsafe_code)]
fn silence_telemetry() {
    // SAFETY: `Library::load` holds a lock, so this crate writes the environment from one thread only. A host that reads
    // or writes its environment from other threads at this very moment must load ONNX Runtime before starting them.
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
}

/// The library's path, from the first place that has it.
pub(super) fn find(explicit: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = explicit {
        return named(path, "--ort-lib");
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|p| !p.is_empty()) {
        return named(Path::new(&path), "ORT_DYLIB_PATH");
    }
    let exe = std::env::current_exe().and_then(|p| p.canonicalize()).ok();
    let exe_folder = exe.as_deref().and_then(Path::parent);
    let mut tried = Vec::new();
    let mut places: Vec<PathBuf> = exe_folder.map(Path::to_owned).into_iter().collect();
    places.extend(
        std::env::var_os("VIRTUAL_ENV")
            .iter()
            .flat_map(|v| wheel_folders(Path::new(v))),
    );
    let cwd = std::env::current_dir().ok();
    for start in [cwd.as_deref(), exe_folder].into_iter().flatten() {
        for folder in start.ancestors() {
            places.extend(wheel_folders(&folder.join(".venv")));
        }
    }
    for place in places {
        if let Some(found) = in_folder(&place) {
            return Ok(found);
        }
        tried.push(place.display().to_string());
    }
    Err(Error::Library {
        reason: format!(
            "no library found (looked in {}); {HOW_TO_GET}",
            tried.join(", ")
        ),
    })
}

fn named(path: &Path, by: &str) -> Result<PathBuf> {
    let found = if path.is_dir() {
        in_folder(path)
    } else {
        path.is_file().then(|| path.to_owned())
    };
    let found = found.ok_or_else(|| Error::Library {
        reason: format!(
            "{by} names {}, where there is no library; {HOW_TO_GET}",
            path.display()
        ),
    })?;
    // `ort` takes relative paths from the executable's folder, a user from the working directory.
    std::path::absolute(&found).map_err(|e| Error::Library {
        reason: format!("{}: {e}", found.display()),
    })
}

/// The folders inside a virtual environment where the wheel keeps its library.
fn wheel_folders(venv: &Path) -> Vec<PathBuf> {
    let mut roots = vec![venv.join("Lib")];
    if let Ok(entries) = std::fs::read_dir(venv.join("lib")) {
        let pythons = entries
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("python"));
        roots.extend(pythons.map(|e| e.path()));
    }
    roots
        .into_iter()
        .map(|r| r.join("site-packages/onnxruntime/capi"))
        .filter(|p| p.is_dir())
        .collect()
}

/// The library in a folder: the plain name if there, else the newest versioned one.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let plain = format!("{prefix}onnxruntime{suffix}");
    let names = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    names
        .filter_map(|name| {
            version_in(&name, &plain, &format!("{prefix}onnxruntime."), suffix).map(|v| (v, name))
        })
        .max()
        .map(|(_, name)| folder.join(name))
}

/// The version in a library's file name (`libonnxruntime.so.1.2.3`, `libonnxruntime.1.2.3.dylib`); the plain name wins over all.
fn version_in(name: &str, plain: &str, stem: &str, suffix: &str) -> Option<Vec<u32>> {
    if name == plain {
        return Some(vec![u32::MAX]);
    }
    let version = match name.strip_prefix(plain) {
        Some(rest) => rest.strip_prefix('.')?,
        None => name.strip_prefix(stem)?.strip_suffix(suffix)?,
    };
    version.split('.').map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn library_names_of_linux_and_macos_wheels_are_recognised() {
        let linux = |name| version_in(name, "libonnxruntime.so", "libonnxruntime.", ".so");
        assert_eq!(linux("libonnxruntime.so"), Some(vec![u32::MAX]));
        assert_eq!(linux("libonnxruntime.so.1.31.1"), Some(vec![1, 31, 1]));
        assert_eq!(linux("libonnxruntime_providers_shared.so"), None);
        let mac = |name| version_in(name, "libonnxruntime.dylib", "libonnxruntime.", ".dylib");
        assert_eq!(mac("libonnxruntime.1.31.1.dylib"), Some(vec![1, 31, 1]));
        assert_eq!(mac("libonnxruntime.dylib"), Some(vec![u32::MAX]));
    }

    #[test]
    fn the_newest_of_several_versions_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        if cfg!(target_os = "linux") {
            for name in ["libonnxruntime.so.1.9.0", "libonnxruntime.so.1.31.1"] {
                std::fs::write(folder.path().join(name), b"").unwrap();
            }
            assert_eq!(
                in_folder(folder.path()),
                Some(folder.path().join("libonnxruntime.so.1.31.1"))
            );
        }
    }

    #[test]
    fn a_missing_explicit_library_says_how_to_get_one() {
        let error = find(Some(Path::new("/no/such/library.so"))).unwrap_err();
        assert!(
            error.to_string().contains("pip install onnxruntime"),
            "{error}"
        );
    }
}
