//! Transfers that break off, lie, or were left half-done: resumed where that is sound, and never taken damaged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use crate::hub_cache::{blobs, content, file, get, gets, hub, leave_part, reason, repository};
use crate::hub_server::{Seen, Server, described, large_file, sha256};
use tempfile::TempDir;
use tronie::Error;

#[test]
fn an_interrupted_transfer_goes_on_where_it_was() {
    let server = Server::start(|seen| large_file(seen, &content()));
    let cache = TempDir::new().unwrap();
    leave_part(&cache, &content(), &content()[..123_456]);
    let path = get(&hub(&server, &cache), &file("w")).unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert_eq!(gets(&server), [Some(123_456)]);
}

#[test]
fn what_an_earlier_run_left_damaged_is_noticed_and_fetched_again() {
    let good = content();
    let mut flipped = good[..300_000].to_vec();
    flipped[17] ^= 1;
    let mut whole = good.clone();
    *whole.last_mut().unwrap() ^= 1;
    let longer = [&good[..], b"more"].concat();
    for (label, part, expected) in [
        ("prefix", flipped, vec![Some(300_000), None]),
        ("whole length", whole, vec![None]),
        ("too long", longer, vec![None]),
        ("complete, not yet renamed", good.clone(), vec![]),
    ] {
        let server = Server::start(|seen| large_file(seen, &content()));
        let cache = TempDir::new().unwrap();
        leave_part(&cache, &good, &part);
        let path = get(&hub(&server, &cache), &file("w")).unwrap();
        assert!(fs::read(path).unwrap() == good, "{label}");
        assert_eq!(gets(&server), expected, "{label}");
        assert_eq!(blobs(&cache), [sha256(&good)], "{label}");
    }
}

#[test]
fn a_server_that_ignores_ranges_is_read_from_the_start() {
    let server = Server::start(|seen| {
        large_file(
            &Seen {
                offset: None,
                ..seen.clone()
            },
            &content(),
        )
    });
    let cache = TempDir::new().unwrap();
    leave_part(&cache, &content(), &content()[..1000]);
    assert_eq!(
        fs::read(get(&hub(&server, &cache), &file("w")).unwrap()).unwrap(),
        content()
    );
    assert_eq!(gets(&server), [Some(1000)]);
}

#[test]
fn a_range_from_elsewhere_is_refused() {
    let server = Server::start(|seen| {
        let shifted = seen.offset.map(|offset| offset - 1);
        large_file(
            &Seen {
                offset: shifted,
                ..seen.clone()
            },
            &content(),
        )
    });
    let cache = TempDir::new().unwrap();
    leave_part(&cache, &content(), &content()[..1000]);
    let found = reason(get(&hub(&server, &cache), &file("w")));
    assert!(
        found.contains("bytes from 1000 on were asked for, and from 999 on are sent"),
        "{found}"
    );
}

#[test]
fn damaged_contents_are_deleted_and_reported() {
    let server = Server::start(|seen| {
        let mut bytes = content();
        bytes[100] ^= 4;
        described(
            large_file(seen, &bytes),
            &sha256(&content()),
            content().len(),
        )
    });
    let cache = TempDir::new().unwrap();
    for part in [None, Some(&content()[..50])] {
        if let Some(part) = part {
            leave_part(&cache, &content(), part);
        }
        let found = reason(get(&hub(&server, &cache), &file("w")));
        assert!(
            found.contains(&format!("SHA-256 {} expected", sha256(&content()))),
            "{found}"
        );
        assert_eq!(blobs(&cache), [""; 0]);
        assert!(!repository(&cache).join("snapshots").exists());
    }
    assert_eq!(gets(&server), [None, Some(50), None]);
}

#[test]
fn a_connection_that_keeps_breaking_is_taken_up_again() {
    let server = Server::start(|seen| large_file(seen, &content()).cut(100_000));
    let cache = TempDir::new().unwrap();
    assert_eq!(
        fs::read(get(&hub(&server, &cache), &file("w")).unwrap()).unwrap(),
        content()
    );
    assert_eq!(gets(&server).len(), 7);
}

#[test]
fn a_transfer_that_gets_nowhere_ends_and_keeps_what_it_has() {
    let broken = Server::start(|seen| {
        let cut = if seen.offset.is_none() { 1000 } else { 0 };
        large_file(seen, &content()).cut(cut)
    });
    let cache = TempDir::new().unwrap();
    let found = reason(get(&hub(&broken, &cache), &file("w")));
    let expected = format!(
        "truncated: {} bytes expected, 1000 arrived",
        content().len()
    );
    assert!(
        found.contains(&expected) && found.contains("run again to resume"),
        "{found}"
    );
    assert_eq!(blobs(&cache), [format!("{}.part", sha256(&content()))]);
    let server = Server::start(|seen| large_file(seen, &content()));
    get(&hub(&server, &cache), &file("w")).unwrap();
    assert_eq!(gets(&server), [Some(1000)]);
}

#[test]
fn more_bytes_than_announced_are_refused() {
    let cache = TempDir::new().unwrap();
    let other =
        Server::start(|seen| described(large_file(seen, &content()), &sha256(&content()), 1000));
    let found = reason(get(&hub(&other, &cache), &file("w")));
    assert!(found.contains("the hub says 1000 bytes, and"), "{found}");
    let endless = Server::start(|seen| {
        let mut reply = large_file(seen, &content());
        reply.headers.retain(|(name, _)| *name != "Content-Length");
        reply.body.extend([0; 10]);
        reply
    });
    let found = reason(get(&hub(&endless, &cache), &file("w")));
    assert!(
        found.contains("more bytes are sent than the file has"),
        "{found}"
    );
}

#[test]
fn a_callback_can_stop_a_transfer_with_its_own_error() {
    let server = Server::start(|seen| large_file(seen, &content()));
    let cache = TempDir::new().unwrap();
    let result = hub(&server, &cache).resolve(&file("w"), &mut |transfer| {
        if transfer.done > 0 {
            Err(Error::Cancelled { step: 7 })
        } else {
            Ok(())
        }
    });
    assert!(matches!(result, Err(Error::Cancelled { step: 7 })));
    assert_eq!(blobs(&cache), [format!("{}.part", sha256(&content()))]);
}
