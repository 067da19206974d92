//! `tronie cache`: the folder of weights that were expanded to f32.

use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::HumanDuration;
use serde_json::json;

use super::args::{CacheArgs, CacheCommand, ClearArgs};
use super::console::{print, say};
use crate::error::{Error, Result};
use crate::weights::{Entry, ExpansionCache, OriginState, readable_size};

/// Digits of a key that stand in the list.
const SHOWN_DIGITS: usize = 12;

pub(super) fn cache(args: &CacheArgs) -> Result<()> {
    let cache = ExpansionCache::from_env();
    match &args.command {
        Some(CacheCommand::Clear(clear)) => remove(&cache, clear, args.json),
        Some(CacheCommand::List) | None => list(&cache, args.json),
    }
}

fn list(cache: &ExpansionCache, as_json: bool) -> Result<()> {
    let entries = cache.entries()?;
    let total: u64 = entries.iter().map(|e| e.bytes).sum();
    let unfinished = cache.unfinished_bytes();
    if as_json {
        let listed = json!({
            "folder": cache.folder().map(|f| f.to_string_lossy()),
            "entries": entries.iter().map(as_value).collect::<Vec<_>>(),
            "total-bytes": total,
            "unfinished-bytes": unfinished,
        });
        return print(&listed.to_string());
    }
    let Some(folder) = cache.folder() else {
        return print(&format!("no folder: {}", why_none()));
    };
    print(&folder.display().to_string())?;
    for entry in &entries {
        print_entry(entry)?;
    }
    let count = entries.len();
    let entries = if count == 1 { "entry" } else { "entries" };
    print(&format!("{count} {entries}, {}", readable_size(total)))?;
    if unfinished > 0 {
        let size = readable_size(unfinished);
        print(&format!(
            "{size} unfinished: being written, or left by a killed run and deleted by the next one"
        ))?;
    }
    Ok(())
}

fn print_entry(entry: &Entry) -> Result<()> {
    let size = readable_size(entry.bytes);
    let mark = if entry.is_orphan {
        "  no source left"
    } else {
        ""
    };
    print(&format!(
        "  {}  {size:>8}  {}{mark}",
        shown(entry),
        last_use(entry.last_used)
    ))?;
    for origin in &entry.sources {
        let mark = match origin.state {
            OriginState::Present => String::new(),
            other => format!("  ({})", other.name()),
        };
        print(&format!("    {}{mark}", origin.path))?;
    }
    Ok(())
}

fn shown(entry: &Entry) -> &str {
    entry.key.get(..SHOWN_DIGITS).unwrap_or(&entry.key)
}

fn last_use(when: Option<SystemTime>) -> String {
    match when.and_then(|when| when.elapsed().ok()) {
        Some(ago) => format!("used {} ago", HumanDuration(ago)),
        None => "last use unknown".to_owned(),
    }
}

fn as_value(entry: &Entry) -> serde_json::Value {
    let used = entry
        .last_used
        .and_then(|when| when.duration_since(UNIX_EPOCH).ok());
    let sources = entry
        .sources
        .iter()
        .map(|o| json!({"path": o.path, "state": o.state.name()}));
    json!({
        "key": entry.key,
        "file": entry.file.to_string_lossy(),
        "bytes": entry.bytes,
        "last-used": used.map(|since| since.as_secs()),
        "orphan": entry.is_orphan,
        "sources": sources.collect::<Vec<_>>(),
    })
}

fn remove(cache: &ExpansionCache, args: &ClearArgs, as_json: bool) -> Result<()> {
    let entries = cache.entries()?;
    let chosen = chosen(&entries, args)?;
    for entry in &chosen {
        cache.remove(entry)?;
    }
    let unfinished = cache.unfinished_bytes();
    let swept = cache.remove_unfinished()?;
    let freed = chosen.iter().map(|e| e.bytes).sum::<u64>() + if swept { unfinished } else { 0 };
    if as_json {
        let keys = chosen.iter().map(|e| &e.key).collect::<Vec<_>>();
        return print(&json!({"removed": keys, "freed-bytes": freed}).to_string());
    }
    for entry in &chosen {
        print(&format!(
            "removed {}  {}",
            shown(entry),
            readable_size(entry.bytes)
        ))?;
    }
    if !swept && unfinished > 0 {
        say("a process is just expanding weights; its file stays");
    }
    print(&format!("{} freed", readable_size(freed)))
}

/// The entries that `clear` is about: all, those that are named, or those without a source.
fn chosen<'a>(entries: &'a [Entry], args: &ClearArgs) -> Result<Vec<&'a Entry>> {
    if args.orphans {
        return Ok(entries.iter().filter(|e| e.is_orphan).collect());
    }
    if args.entries.is_empty() {
        return Ok(entries.iter().collect());
    }
    let mut chosen: Vec<&Entry> = Vec::new();
    for name in &args.entries {
        let one = named(entries, name)?;
        if chosen.iter().all(|e| e.key != one.key) {
            chosen.push(one);
        }
    }
    Ok(chosen)
}

/// The one entry whose key begins with `name`, or which stands for the weight file `name`.
fn named<'a>(entries: &'a [Entry], name: &str) -> Result<&'a Entry> {
    let path = std::path::absolute(name).unwrap_or_default();
    let path = path.to_string_lossy();
    let found: Vec<_> = entries
        .iter()
        .filter(|e| e.key.starts_with(name) || e.sources.iter().any(|o| o.path == path))
        .collect();
    match found[..] {
        [one] if !name.is_empty() => Ok(one),
        [] => Err(Error::request(
            "cache clear",
            format!("there is no entry {name}: `tronie cache` lists them by key and source"),
        )),
        _ => Err(Error::request(
            "cache clear",
            format!(
                "{name} is the beginning of {} keys: give more digits",
                found.len()
            ),
        )),
    }
}

/// Why nothing is kept.
fn why_none() -> &'static str {
    if std::env::var_os("TRONIE_CACHE").is_some_and(|value| value == "off") {
        "TRONIE_CACHE is off"
    } else {
        "no home directory is known; set TRONIE_CACHE"
    }
}
