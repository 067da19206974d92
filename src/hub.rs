//! Where files come from: the disk, or a repository of the Hugging Face hub by way of its cache.
//!
//! The cache has the layout of Python's `huggingface_hub`, so files that either has fetched serve both, and a cached
//! file is found without any connection. The layout is taken from the
//! `hf-hub` crate. The transfer is our own, over `ureq`, and not that crate's: release 0.5
//! of that crate resumes onto whatever a `.part` file holds and never compares the result with the file's hash, does
//! not notice a server that ignores its range, uses the server's `ETag` as a path unchecked, sends the user's token on
//! to the host that a redirect names, has no timeout, and panics on a redirect without a target. Here a blob appears in
//! the cache only when its size is right and, for large files (whose `ETag` is their SHA-256), its hash too.
//!
//! Python twin: `huggingface_hub.hf_hub_download`.

mod cache;
mod client;
mod names;
mod transfer;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use cache::Cache;
use client::Client;
use transfer::Job;

use crate::error::{Error, Result};
use crate::manifest::{Catalogue, HubFile};

/// How to reach the hub.
#[derive(Clone)]
pub struct HubOptions {
    /// The cache (the folder that holds `models--…`); none if no home directory is known.
    pub cache_dir: Option<PathBuf>,
    /// The hub's address, `https://huggingface.co` unless a mirror is set.
    pub endpoint: Option<String>,
    /// The user's access token.
    pub token: Option<String>,
    /// Make no connection, whatever happens.
    pub offline: bool,
    /// How often a busy server or a broken transfer is tried again without any progress.
    pub retries: u32,
}

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            cache_dir: None,
            endpoint: None,
            token: None,
            offline: false,
            retries: 4,
        }
    }
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .finish()
    }
}

impl HubOptions {
    /// The options that the environment gives, by the rules of `huggingface_hub`: `HF_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// [`HubOptions::from_env`] for any set of variables. Empty ones count as not set.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let var = |name| var(name).filter(|value| !value.is_empty());
        let text = |name| {
            var(name)
                .and_then(|value| value.into_string().ok())
                .map(|value| value.trim().to_owned())
        };
        let hf_home = var("HF_HOME").map(PathBuf::from).or_else(|| {
            let caches = var("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| Some(home?.join(".cache")))?;
            Some(caches.join("huggingface"))
        });
        let token_file = var("HF_TOKEN_PATH")
            .map(PathBuf::from)
            .or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token = text("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file?).ok());
        let yes = |value: String| {
            matches!(
                value.to_ascii_uppercase().as_str(),
                "1" | "ON" | "YES" | "TRUE"
            )
        };
        Self {
            cache_dir: var("HF_HUB_CACHE")
                .map(PathBuf::from)
                .or_else(|| Some(hf_home?.join("hub"))),
            endpoint: text("HF_ENDPOINT"),
            token: token
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            ..Self::default()
        }
    }
}

/// How far [`Hub::resolve`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer<'a> {
    /// The repository, `owner/name`.
    pub repo: &'a str,
    /// The file inside it.
    pub file: &'a str,
    /// What is going on.
    pub phase: Phase,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes in all, if the server says.
    pub total: Option<u64>,
}

/// What a transfer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Another process is fetching the same file.
    Waiting,
    /// Bytes come in.
    Receiving,
    /// The file is being compared with its hash.
    Verifying,
}

/// Called several times a second while a file is fetched. An error from it ends the transfer, is what
/// [`Hub::resolve`] returns, and leaves what has arrived for the next try.
pub type OnTransfer<'a> = dyn FnMut(&Transfer<'_>) -> Result<()> + 'a;

/// Finds files, fetching those that are not on disk.
#[derive(Debug)]
pub struct Hub {
    cache_dir: Option<PathBuf>,
    client: Client,
    offline: bool,
    retries: u32,
}

impl Hub {
    /// Prepares the client; connects to nothing.
    ///
    /// # Errors
    /// [`Error::Request`] if the endpoint is no http(s) address or the token is no token.
    pub fn new(options: HubOptions) -> Result<Self> {
        let HubOptions {
            cache_dir,
            endpoint,
            token,
            offline,
            retries,
        } = options;
        let client = Client::new(
            endpoint.as_deref().unwrap_or("https://huggingface.co"),
            token,
        )?;
        Ok(Self {
            cache_dir,
            client,
            offline,
            retries,
        })
    }

    /// The environment's hub ([`HubOptions::from_env`]).
    ///
    /// # Errors
    /// As [`Hub::new`].
    pub fn from_env() -> Result<Self> {
        Self::new(HubOptions::from_env())
    }

    /// The folder that holds what was downloaded; none if no home directory is known.
    pub fn cache_dir(&self) -> Option<&Path> {
        self.cache_dir.as_deref()
    }

    /// The catalogue as [`Catalogue::open`] reads it, with the default model that the cache decides.
    ///
    /// # Errors
    /// Those of [`Catalogue::open`].
    pub fn catalogue(&self, models: Option<&Path>) -> Result<Catalogue> {
        let mut catalogue = Catalogue::open(models)?;
        catalogue.settle_default(|file| self.cached(file).is_some());
        Ok(catalogue)
    }

    /// The file's path if it is in the cache already. Makes no connection.
    pub fn cached(&self, file: &HubFile) -> Option<PathBuf> {
        let place = Place::of(file);
        names::check(place).ok()?;
        Cache::new(self.cache_dir.as_ref()?, place).find()
    }

    /// The file's path on disk, after fetching it if it is not in the cache. Cached files need no connection.
    ///
    /// # Errors
    /// [`Error::Hub`] if a name is not one of a hub file, or the file cannot be fetched, with the reason: no such file,
    /// no access, offline, no connection, damaged in transfer. What `on_transfer` returns.
    pub fn resolve(&self, file: &HubFile, on_transfer: &mut OnTransfer<'_>) -> Result<PathBuf> {
        self.resolve_place(Place::of(file), on_transfer)
    }

    fn resolve_place(&self, place: Place<'_>, on_transfer: &mut OnTransfer<'_>) -> Result<PathBuf> {
        names::check(place).map_err(|reason| place.error(reason))?;
        let Some(root) = &self.cache_dir else {
            return Err(
                place.error("no home directory is known: set HF_HOME to a folder for downloads")
            );
        };
        let cache = Cache::new(root, place);
        if let Some(path) = cache.find() {
            return Ok(path);
        }
        if self.offline {
            return Err(place.error(format!(
                "is not in the cache {}, and HF_HUB_OFFLINE forbids to fetch it: unset that, or run \
                 `hf download {} {}` where there is a connection and copy the cache",
                root.display(),
                place.repo,
                place.file
            )));
        }
        Job {
            place,
            cache: &cache,
            client: &self.client,
            retries: self.retries,
            on_transfer,
        }
        .run()
    }
}

/// A file of the hub, by its full name.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    repo: &'a str,
    file: &'a str,
    revision: &'a str,
}

impl<'a> Place<'a> {
    fn of(file: &'a HubFile) -> Self {
        Self {
            repo: &file.repo,
            file: &file.file,
            revision: file.revision.as_deref().unwrap_or("main"),
        }
    }
}

impl Place<'_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Hub {
            repo: self.repo.to_owned(),
            file: self.file.to_owned(),
            reason: reason.into(),
        }
    }
}
