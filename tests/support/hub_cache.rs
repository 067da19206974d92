//! A cache in a temporary folder, a hub client on it, and what lies in it.
#![allow(dead_code)] // Each test file uses a part of it.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;
use tronie::hub::{Hub, HubOptions};
use tronie::manifest::HubFile;
use tronie::{Error, Result};

use crate::hub_server::{Server, sha256};

/// More than one read's worth, and a well-formed weight file.
pub fn content() -> Vec<u8> {
    let header = r#"{"w":{"dtype":"U8","shape":[600000],"data_offsets":[0,600000]}}"#;
    let data: Vec<u8> = (0..600_000_u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &data,
    ]
    .concat()
}

pub fn file(name: &str) -> HubFile {
    HubFile {
        repo: "some/model".into(),
        file: name.into(),
        revision: None,
    }
}

pub fn hub(server: &Server, cache: &TempDir) -> Hub {
    hub_with(
        server,
        cache,
        HubOptions {
            retries: 1,
            ..HubOptions::default()
        },
    )
}

pub fn hub_with(server: &Server, cache: &TempDir, options: HubOptions) -> Hub {
    Hub::new(HubOptions {
        cache_dir: Some(cache.path().into()),
        endpoint: Some(server.url.clone()),
        ..options
    })
    .unwrap()
}

pub fn get(hub: &Hub, file: &HubFile) -> Result<PathBuf> {
    hub.resolve(file, &mut |_| Ok(()))
}

pub fn reason(result: Result<PathBuf>) -> String {
    match result {
        Err(Error::Hub { repo, reason, .. }) => {
            assert_eq!(repo, "some/model");
            reason
        }
        other => panic!("an error about a hub file was expected, not {other:?}"),
    }
}

pub fn repository(cache: &TempDir) -> PathBuf {
    cache.path().join("models--some--model")
}

pub fn blobs(cache: &TempDir) -> Vec<String> {
    let Ok(entries) = fs::read_dir(repository(cache).join("blobs")) else {
        return vec![];
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Leaves `bytes` as if an earlier transfer of `content` had been interrupted.
pub fn leave_part(cache: &TempDir, content: &[u8], bytes: &[u8]) {
    fs::create_dir_all(repository(cache).join("blobs")).unwrap();
    fs::write(
        repository(cache)
            .join("blobs")
            .join(format!("{}.part", sha256(content))),
        bytes,
    )
    .unwrap();
}

pub fn gets(server: &Server) -> Vec<Option<usize>> {
    server
        .requests()
        .iter()
        .filter(|seen| seen.method == "GET")
        .map(|seen| seen.offset)
        .collect()
}
