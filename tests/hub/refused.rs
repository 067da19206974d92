//! What the hub, a mirror, or somebody who plays one may not do, and how refusals are told to the user.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::hub_server::{COMMIT, Reply, Server, described, large_file, sha256};
use tempfile::TempDir;
use tronie::hub::{Hub, HubOptions};
use tronie::manifest::HubFile;
use tronie::{Error, Result};

fn get_with(url: &str, cache: &TempDir, options: HubOptions) -> Result<PathBuf> {
    let cache_dir = Some(cache.path().to_owned());
    let hub = Hub::new(HubOptions {
        cache_dir,
        endpoint: Some(url.into()),
        ..options
    })
    .unwrap();
    let file = HubFile {
        repo: "some/model".into(),
        file: "w".into(),
        revision: None,
    };
    hub.resolve(&file, &mut |_| Ok(()))
}

/// The reason why the file cannot be had from this server; nothing may be left in the cache.
fn refused(server: &Server) -> String {
    let cache = TempDir::new().unwrap();
    let result = get_with(
        &server.url,
        &cache,
        HubOptions {
            retries: 0,
            ..HubOptions::default()
        },
    );
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    match result {
        Err(Error::Hub { reason, .. }) => reason,
        other => panic!("an error about a hub file was expected, not {other:?}"),
    }
}

#[test]
#[rustfmt::skip]
fn each_refusal_has_its_own_words() {
    let cases = [
        (404, "EntryNotFound", "not found (HTTP 404): the repository has no such file at revision `main`"),
        (404, "RevisionNotFound", "not found (HTTP 404): the repository has no revision `main`"),
        (404, "RepoNotFound", "there is no such repository or file, or it is private"),
        (401, "RepoNotFound", "not found (HTTP 401): there is no such repository or file, or it is private and HF_TOKEN"),
        (404, "", "not found (HTTP 404): there is no such repository or file"),
        (401, "", "access denied (HTTP 401): the model is gated or private; accept its licence at http://127.0.0.1:"),
        (401, "GatedRepo", "set HF_TOKEN to a token that may read it"),
        (403, "GatedRepo", "access denied (HTTP 403): the model is gated or private"),
        (429, "", "the server is busy or broken (HTTP 429)"),
        (503, "", "the server is busy or broken (HTTP 503)"),
        (418, "", "the server answers HTTP 418"),
    ];
    for (status, code, expected) in cases {
        let server = Server::start(move |_| {
            let reply = Reply::new(status, b"");
            if code.is_empty() { reply } else { reply.with("X-Error-Code", code) }
        });
        let found = refused(&server);
        assert!(found.contains(expected), "{status} {code}: expected `{expected}` in `{found}`");
        assert_eq!(server.requests().len(), 1);
    }
}

#[test]
fn a_token_that_is_refused_is_suspected() {
    let server = Server::start(|_| Reply::new(403, b""));
    let options = HubOptions {
        token: Some("hf_old".into()),
        ..HubOptions::default()
    };
    let error = get_with(&server.url, &TempDir::new().unwrap(), options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the token that is set may have expired"),
        "{error}"
    );
    assert!(!error.contains("hf_old"));
}

#[test]
fn a_busy_server_is_asked_again_when_it_says() {
    let content = b"contents";
    let count = AtomicUsize::new(0);
    let server = Server::start(move |seen| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::new(429, b"").with("Retry-After", 1),
        1 => Reply::new(500, b"").with("Retry-After", 0),
        _ => large_file(seen, content),
    });
    let start = Instant::now();
    let cache = TempDir::new().unwrap();
    let path = get_with(
        &server.url,
        &cache,
        HubOptions {
            retries: 2,
            ..HubOptions::default()
        },
    )
    .unwrap();
    assert_eq!(std::fs::read(path).unwrap(), content);
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_server_that_is_gone_is_named() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let found = get_with(&url, &TempDir::new().unwrap(), HubOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        found.contains("127.0.0.1 cannot be reached") && found.contains("HF_ENDPOINT"),
        "{found}"
    );
}

#[test]
fn headers_that_would_become_paths_are_refused() {
    let hash = sha256(b"x");
    for (etag, commit, expected) in [
        ("../../../../x", COMMIT, "no usable hash"),
        ("", COMMIT, "no usable hash"),
        ("/etc/passwd", COMMIT, "no usable hash"),
        (&"a".repeat(10_000), COMMIT, "no usable hash"),
        (&hash.to_uppercase(), COMMIT, "no usable hash"),
        (&hash, "../../x", "no usable commit"),
        (&hash, "main", "no usable commit"),
        (&hash, "", "no usable commit"),
    ] {
        let (etag, commit) = (etag.to_owned(), commit.to_owned());
        let server = Server::start(move |_| {
            described(Reply::new(200, b"x"), &etag, 1).with("X-Repo-Commit", &commit)
        });
        let found = refused(&server);
        assert!(
            found.contains(expected) && found.contains("HF_ENDPOINT"),
            "expected `{expected}` in `{found}`"
        );
    }
    let plain = Server::start(|_| Reply::new(200, b"x"));
    assert!(refused(&plain).contains("no usable commit"));
    let sized = Server::start(|_| {
        described(Reply::new(200, b"x"), &sha256(b"x"), 1).with("X-Linked-Size", "-1")
    });
    assert!(refused(&sized).contains("no usable size"));
}

#[test]
fn redirects_lead_only_to_the_web_and_not_in_circles() {
    for (location, expected) in [
        ("/some/model/resolve/main/w", "redirects in a circle"),
        ("file:///etc/passwd", "redirects to no address"),
        (
            "file://host/etc/passwd",
            "not http(s), which is not followed",
        ),
        ("ftp://127.0.0.1/x", "not http(s), which is not followed"),
        ("relative", "not http(s), which is not followed"),
        ("http://[", "redirects to no address"),
    ] {
        let found = refused(&Server::start(move |_| {
            Reply::new(302, b"").with("Location", location)
        }));
        assert!(
            found.contains(expected),
            "{location}: expected `{expected}` in `{found}`"
        );
    }
    assert!(refused(&Server::start(|_| Reply::new(302, b""))).contains("redirects to nowhere"));
}

#[test]
#[rustfmt::skip]
fn names_that_are_paths_are_refused_before_any_request() {
    let server = Server::start(|seen| large_file(seen, b"x"));
    let cache = TempDir::new().unwrap();
    let hub = Hub::new(HubOptions {
        cache_dir: Some(cache.path().into()),
        endpoint: Some(server.url.clone()),
        ..HubOptions::default()
    })
    .unwrap();
    let long = "x".repeat(256);
    let resolve = |repo: &str, file: &str, revision: &str| {
        let file = HubFile { repo: repo.into(), file: file.into(), revision: Some(revision.into()) };
        hub.resolve(&file, &mut |_| Ok(()))
    };
    for repo in ["", "a/b/c", "../x", "a/..", "/a", "a/", "a b/c", "a--b/c", "a\\b", "https://huggingface.co/a/b", "a\0/b", ".a/b", "ä/b", &long] {
        let found = resolve(repo, "w", "main").unwrap_err().to_string();
        assert!(found.contains("is no repository: `owner/name` is expected"), "{repo}: {found}");
    }
    for file in ["", "/etc/passwd", "../w", "a/../w", "a//w", "./w", "a/", "a\\w", "C:w", "w\0", "w\n", "w.", "w ", &long] {
        let found = resolve("a/b", file, "main").unwrap_err().to_string();
        assert!(found.contains("is no file of a repository"), "{file}: {found}");
    }
    for revision in ["", "..", "a/../../x", "/x", "x\\y", "x\0"] {
        let found = resolve("a/b", "w", revision).unwrap_err().to_string();
        assert!(found.contains("is no revision"), "{revision}: {found}");
    }
    assert_eq!(server.requests().len(), 0);
    resolve("gpt2", "w", "v1.0").unwrap();
}

#[test]
fn endpoints_and_tokens_that_are_none_are_refused() {
    for endpoint in [
        "",
        "huggingface.co",
        "ftp://hub",
        "http://",
        "https://hub/?a=b",
        "not an address",
    ] {
        let options = HubOptions {
            endpoint: Some(endpoint.into()),
            ..HubOptions::default()
        };
        match Hub::new(options) {
            Err(Error::Request {
                field: "HF_ENDPOINT",
                ..
            }) => {}
            other => panic!("{endpoint}: {other:?}"),
        }
    }
    for token in ["hf_a\nb", "hf a", "hf_ä"] {
        let options = HubOptions {
            token: Some(token.into()),
            ..HubOptions::default()
        };
        let error = Hub::new(options).unwrap_err();
        assert!(matches!(
            error,
            Error::Request {
                field: "HF_TOKEN",
                ..
            }
        ));
        assert!(!error.to_string().contains(token));
    }
}

#[test]
fn no_debug_output_shows_the_token() {
    let options = HubOptions {
        token: Some("hf_secret".into()),
        ..HubOptions::default()
    };
    assert!(!format!("{options:?}").contains("hf_secret"));
    assert!(!format!("{:?}", Hub::new(options).unwrap()).contains("hf_secret"));
}

#[test]
#[rustfmt::skip]
fn the_environment_means_what_it_means_to_python() {
    let home = TempDir::new().unwrap();
    std::fs::create_dir_all(home.path().join(".cache/huggingface")).unwrap();
    std::fs::write(home.path().join(".cache/huggingface/token"), "hf_file\n").unwrap();
    let options = |vars: &[(&str, &str)]| {
        let find = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        HubOptions::from_vars(find, Some(home.path().to_owned()))
    };
    let cache = |vars: &[(&str, &str)]| options(vars).cache_dir.unwrap();
    assert_eq!(cache(&[]), home.path().join(".cache/huggingface/hub"));
    assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]), Path::new("/h/hub"));
    assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    assert_eq!(cache(&[("HF_HOME", "")]), home.path().join(".cache/huggingface/hub"));
    assert_eq!(HubOptions::from_vars(|_| None, None).cache_dir, None);

    assert_eq!(options(&[]).token.as_deref(), Some("hf_file"));
    assert_eq!(options(&[("HF_TOKEN", " hf_env\n")]).token.as_deref(), Some("hf_env"));
    assert_eq!(options(&[("HF_HOME", "/nowhere")]).token, None);
    let elsewhere = home.path().join(".cache/huggingface/token");
    assert_eq!(options(&[("HF_HOME", "/nowhere"), ("HF_TOKEN_PATH", elsewhere.to_str().unwrap())]).token.as_deref(), Some("hf_file"));

    assert_eq!(options(&[("HF_ENDPOINT", "https://mirror")]).endpoint.as_deref(), Some("https://mirror"));
    for (value, offline) in [("1", true), ("true", true), ("YES", true), ("on", true), ("0", false), ("", false), ("false", false)] {
        assert_eq!(options(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
    }
}
