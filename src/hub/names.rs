//! Which names of repositories, files and revisions are names, and not paths out of the cache.
//!
//! Python twin: `huggingface_hub.utils.validate_repo_id`.

use super::Place;

/// Refuses a name that the hub could not have, in particular any that would lead out of the cache folder.
pub(super) fn check(place: Place<'_>) -> Result<(), String> {
    let Place {
        repo,
        file,
        revision,
    } = place;
    if !is_repo(repo) {
        return Err(format!(
            "{repo:?} is no repository: `owner/name` is expected, of letters, digits, `_`, `-` and single `.`"
        ));
    }
    if !is_path(file) {
        return Err(format!(
            "{file:?} is no file of a repository: a relative path with `/` is expected, without `..`"
        ));
    }
    if !is_path(revision) {
        return Err(format!(
            "{revision:?} is no revision: a branch, tag or commit is expected"
        ));
    }
    Ok(())
}

fn is_repo(repo: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        !part.is_empty()
            && part.chars().all(plain)
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
    };
    let doubled = repo.contains("--") || repo.contains("..");
    repo.len() <= 96 && !doubled && repo.split('/').count() <= 2 && repo.split('/').all(part)
}

fn is_path(path: &str) -> bool {
    // Colon and backslash lead elsewhere on Windows; a trailing dot or space vanishes there.
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.len() <= 255
            && !s.ends_with(['.', ' '])
            && !s.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
    };
    path.len() <= 1024 && path.split('/').all(segment)
}

/// Whether this is a commit's full name.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// Whether this is an `ETag` that may name a blob: a git or LFS hash, or a mirror's MD5.
pub(super) fn is_etag(text: &str) -> bool {
    (32..=64).contains(&text.len()) && is_hex(text)
}

/// Whether this is a SHA-256, as the hub uses it for large files.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A path for a URL; `/` stays if it is in `keep`.
pub(super) fn percent_encoded(text: &str, keep: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(b).to_string()
            }
            _ if keep.as_bytes().contains(&b) => char::from(b).to_string(),
            _ => format!("%{b:02X}"),
        })
        .collect()
}
