//! f16 and bf16 weights on disk as f32: exact, made once, never half, and gone when they are told to go.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/expansions.rs"]
mod expansions;
#[path = "support/safetensors_file.rs"]
mod safetensors_file;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use expansions::{Seen, Shop, patterns};
use safetensors_file::{f32_bytes, well_formed};
use tronie::Error;
use tronie::weights::{Change, Dtype, Expanding, ExpansionCache, OriginState, Weights};

/// Values by their bits.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_f16_and_bf16_is_on_disk_what_it_is_in_memory() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (weights, _) = shop.expanded(&file);
    let plain = Weights::open(&[file]).unwrap();
    for (name, dtype) in [("h", Dtype::F16), ("b", Dtype::BF16)] {
        let data = weights.tensor_f32(name, &[256, 256]).unwrap();
        assert!(data.is_mapped());
        let memory = plain.tensor_f32(name, &[256, 256]).unwrap();
        assert!(!memory.is_mapped());
        // As bits, which tell NaN from NaN and -0 from 0.
        assert!(bits(data.as_slice()) == bits(memory.as_slice()), "{name}");
        assert_eq!(weights.get(name).unwrap().dtype, dtype);
    }
    let half = weights.tensor_f32("h", &[256, 256]).unwrap();
    let at = |pattern: usize| half.as_slice()[pattern];
    assert_eq!(at(0x0001).to_bits(), 2_f32.powi(-24).to_bits());
    assert_eq!(at(0x83ff).to_bits(), (-1023.0 * 2_f32.powi(-24)).to_bits());
    assert_eq!(at(0xfc00).to_bits(), f32::NEG_INFINITY.to_bits());
    assert!(at(0x7c01).is_nan() && at(0xffff).is_nan());
}

#[test]
fn what_is_f32_stays_in_its_file_and_what_is_no_float_stays_unread() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let (weights, _) = shop.expanded(&file);
    let kept = weights.tensor_f32("f", &[2]).unwrap();
    assert_eq!(kept.as_slice(), [1.5, -2.5]);
    assert_eq!(
        kept.as_ptr().cast(),
        weights.get("f").unwrap().bytes.as_ptr()
    );
    let made = Weights::open(&[shop.entries()[0].file.clone()]).unwrap();
    assert_eq!(made.names().collect::<Vec<_>>(), ["b", "h"]);
}

#[test]
fn tensors_larger_than_a_batch_and_shards_come_out_right() {
    let shop = Shop::new();
    let values = |seed: u32, count: u32| -> Vec<u8> {
        let mixed = (0..count).map(|i| (i.wrapping_mul(40_503) ^ seed) as u16);
        mixed.flat_map(u16::to_le_bytes).collect()
    };
    let (large, end, other) = (values(1, 9_000_001), values(2, 3), values(3, 9_000_000));
    let first = shop.saved(
        "1.safetensors",
        &well_formed(
            &[
                ("z.large", "F16", &[9_000_001], &large),
                ("none", "F16", &[0, 4], &[]),
                ("a.end", "BF16", &[3], &end),
            ],
            1,
        ),
    );
    let second = shop.saved(
        "2.safetensors",
        &well_formed(&[("m", "BF16", &[3000, 3000], &other)], 0),
    );
    let mut weights = Weights::open(&[first.clone(), second.clone()]).unwrap();
    let mut last = (0, 0);
    shop.cache
        .expand(&mut weights, ["m", "z.large"], &mut |event| {
            if let Expanding::Writing { done, total, .. } = event {
                last = (done, total);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(last, (72_000_016, 72_000_016));
    let plain = Weights::open(&[first, second]).unwrap();
    for (name, shape) in [
        ("z.large", &[9_000_001][..]),
        ("none", &[0, 4]),
        ("a.end", &[3]),
        ("m", &[3000, 3000]),
    ] {
        let (disk, memory) = (
            weights.tensor_f32(name, shape).unwrap(),
            plain.tensor_f32(name, shape).unwrap(),
        );
        assert!(disk.is_mapped(), "{name}");
        assert!(bits(disk.as_slice()) == bits(memory.as_slice()), "{name}");
    }
}

#[test]
fn small_weights_and_those_that_nobody_needs_are_left_alone() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let mut weights = Weights::open(&[file]).unwrap();
    let untouched = |cache: &ExpansionCache, weights: &mut Weights, needed: &[&str]| {
        let needed = needed.iter().copied();
        cache
            .expand(weights, needed, &mut |e| panic!("{e:?}"))
            .unwrap();
        assert!(!shop.cache.folder().unwrap().exists());
        assert!(!weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
    };
    // 65536 values are 256 KiB each as f32.
    let from = |bytes| shop.cache.clone().with_smallest(bytes);
    untouched(&from(512 * 1024 + 1), &mut weights, &["h", "b", "f"]);
    untouched(&from(256 * 1024 + 1), &mut weights, &["h"]);
    untouched(&from(0), &mut weights, &["f"]);
    untouched(
        &ExpansionCache::off().with_smallest(1),
        &mut weights,
        &["h"],
    );
    let real = ExpansionCache::at(shop.cache.folder().unwrap());
    untouched(&real, &mut weights, &["h", "b"]);
    from(512 * 1024)
        .expand(&mut weights, ["h", "b", "f"], &mut |_| Ok(()))
        .unwrap();
    assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
}

/// Adds one to every value.
#[derive(Debug)]
struct OneMore;

impl Change for OneMore {
    fn apply(&self, values: &mut [f32], _: &[usize]) -> Result<(), Error> {
        for value in values {
            *value += 1.0;
        }
        Ok(())
    }
}

#[test]
fn a_change_is_applied_to_what_is_expanded_too() {
    let shop = Shop::new();
    let (mut weights, _) = shop.expanded(&shop.saved("m.safetensors", &patterns()));
    let before = weights.tensor_f32("h", &[256, 256]).unwrap();
    weights.change("h", Arc::new(OneMore)).unwrap();
    let after = weights.tensor_f32("h", &[256, 256]).unwrap();
    let pairs = before.as_slice().iter().zip(after.as_slice());
    assert!(before.is_mapped() && !after.is_mapped());
    assert!(
        pairs
            .into_iter()
            .all(|(b, a)| (b + 1.0).to_bits() == a.to_bits() || b.is_nan())
    );
}

#[cfg(unix)]
fn identity(shop: &Shop) -> (u64, SystemTime) {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(&shop.entries()[0].file).unwrap();
    (meta.ino(), meta.modified().unwrap())
}

#[cfg(unix)]
#[test]
fn the_second_time_nothing_is_written_and_once_the_file_is_settled_nothing_is_hashed() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    assert_eq!(shop.expanded(&file).1, [Seen::Hashing, Seen::Writing]);
    let before = identity(&shop);
    // The file is so new that it could change again within the same tick of its clock: it is not trusted yet.
    assert_eq!(shop.expanded(&file).1, [Seen::Hashing]);
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(shop.expanded(&file).1, [Seen::Hashing]);
    let (weights, seen) = shop.expanded(&file);
    assert_eq!(seen, []);
    assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
    assert_eq!(identity(&shop), before);
    let used = shop.entries()[0].last_used.unwrap();
    assert!(used.elapsed().unwrap() < Duration::from_secs(2));
}

#[cfg(unix)]
#[test]
fn a_changed_file_of_the_same_length_and_time_is_expanded_anew() {
    let shop = Shop::new();
    let mut bytes = patterns();
    let file = shop.saved("m.safetensors", &bytes);
    std::thread::sleep(Duration::from_millis(2100));
    shop.expanded(&file);
    assert_eq!(shop.expanded(&file).1, []);
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&file, &bytes).unwrap();
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(time)
        .unwrap();
    let (weights, seen) = shop.expanded(&file);
    assert_eq!(seen, [Seen::Hashing, Seen::Writing]);
    let data = weights.tensor_f32("b", &[256, 256]).unwrap();
    assert_eq!(data.as_slice()[65_535].to_bits(), 0x7fff << 16);
    let orphans: Vec<_> = shop.entries().iter().map(|e| e.is_orphan).collect();
    assert_eq!(orphans, [false, true]);
}

#[test]
fn the_same_contents_at_two_places_share_one_file() {
    let shop = Shop::new();
    let first = shop.saved("1.safetensors", &patterns());
    let second = shop.saved("2.safetensors", &patterns());
    assert_eq!(shop.expanded(&first).1, [Seen::Hashing, Seen::Writing]);
    let (weights, seen) = shop.expanded(&second);
    assert_eq!(seen, [Seen::Hashing]);
    assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
    let states = || -> BTreeMap<String, OriginState> {
        let [entry] = &shop.entries()[..] else {
            panic!("{:?}", shop.entries())
        };
        let states = entry.sources.iter().map(|o| (o.path.clone(), o.state));
        states.collect()
    };
    let path = |file: &std::path::Path| file.to_string_lossy().into_owned();
    assert_eq!(
        states(),
        BTreeMap::from([
            (path(&first), OriginState::Present),
            (path(&second), OriginState::Present)
        ])
    );
    fs::remove_file(&first).unwrap();
    assert_eq!(states()[&path(&first)], OriginState::Gone);
    assert!(!shop.entries()[0].is_orphan);
    fs::write(&second, b"something else").unwrap();
    assert_eq!(states()[&path(&second)], OriginState::Changed);
    assert!(shop.entries()[0].is_orphan);
}

#[test]
fn a_damaged_expansion_is_noticed_and_made_again() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    shop.expanded(&file);
    let made = shop.entries()[0].file.clone();
    let good = fs::read(&made).unwrap();
    let other = well_formed(&[("h", "F32", &[1], &f32_bytes(&[0.0]))], 0);
    let key = shop.entries()[0].key.clone();
    let text = String::from_utf8_lossy(&good[8..200]).into_owned();
    assert!(text.contains(&key));
    let mut false_key = good.clone();
    let at = 8 + text.find(&key).unwrap();
    false_key[at] = if false_key[at] == b'0' { b'1' } else { b'0' };
    let data = good.len() - 2 * 65_536 * 4;
    let header = String::from_utf8(good[8..data].to_vec()).unwrap();
    let header = header.replace("[256,256]", "[128,512]");
    let swapped = [&good[..8], header.as_bytes(), &good[data..]].concat();
    for (label, bytes, reason) in [
        ("cut", &good[..good.len() - 1], "truncated"),
        ("longer", &[&good[..], b"x"].concat(), "belong to no tensor"),
        ("header only", &good[..100], "truncated"),
        ("empty", &[], "empty"),
        ("another file", &other, "header"),
        ("another key", &false_key, "header"),
        ("other shapes", &swapped, "tensors"),
    ] {
        fs::write(&made, bytes).unwrap();
        let mut told = None;
        let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
        shop.cache
            .expand(&mut weights, ["h"], &mut |event| {
                if let Expanding::Damaged { file, reason } = event {
                    told = Some((file.to_owned(), reason.to_owned()));
                }
                Ok(())
            })
            .unwrap();
        let (path, found) = told.unwrap_or_else(|| panic!("{label}"));
        assert_eq!(path, made);
        assert!(found.contains(reason), "{label}: {found}");
        assert!(fs::read(&made).unwrap() == good, "{label}");
        assert!(weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
    }
}

#[test]
fn a_damaged_record_only_costs_another_hash() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    shop.expanded(&file);
    let sources = shop.cache.folder().unwrap().join("sources");
    for entry in fs::read_dir(&sources).unwrap() {
        fs::write(entry.unwrap().path(), b"{\"key\":").unwrap();
    }
    assert_eq!(shop.entries()[0].sources, []);
    assert_eq!(shop.expanded(&file).1, [Seen::Hashing]);
    assert_eq!(shop.entries()[0].sources.len(), 1);
}

#[test]
fn a_file_that_changes_while_it_is_read_gets_no_expansion() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    for during in [Seen::Hashing, Seen::Writing] {
        let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
        let outcome = shop.cache.expand(&mut weights, ["h"], &mut |event| {
            if Seen::of(&event) == during {
                // A new file in its place, as careful programs do it. The mapping keeps the old one.
                let new = shop.saved("new", &patterns());
                fs::rename(new, &file).unwrap();
            }
            Ok(())
        });
        match outcome {
            Err(Error::Weights { path, reason }) => {
                assert_eq!(path, file);
                assert!(reason.contains("while it was read"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        assert!(shop.entries().is_empty());
        assert_eq!(shop.cache.unfinished_bytes(), 0);
    }
}

#[test]
fn a_cancelled_expansion_leaves_nothing() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    for (during, from) in [(Seen::Hashing, 0), (Seen::Writing, 0), (Seen::Writing, 1)] {
        let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
        let outcome = shop.cache.expand(&mut weights, ["h"], &mut |event| {
            let done = match event {
                Expanding::Hashing { done, .. } | Expanding::Writing { done, .. } => done,
                _ => 0,
            };
            if Seen::of(&event) == during && done >= from {
                return Err(Error::Cancelled { step: 0 });
            }
            Ok(())
        });
        assert!(
            matches!(outcome, Err(Error::Cancelled { .. })),
            "{outcome:?}"
        );
        assert!(!weights.tensor_f32("h", &[256, 256]).unwrap().is_mapped());
        assert!(shop.entries().is_empty());
        assert_eq!(shop.cache.unfinished_bytes(), 0);
    }
    assert_eq!(shop.expanded(&file).1, [Seen::Hashing, Seen::Writing]);
}

#[test]
fn a_folder_that_cannot_be_is_refused_with_what_helps() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    let blocked = ExpansionCache::at(file.join("weights")).with_smallest(1);
    let unknown = ExpansionCache::from_vars(None, None).with_smallest(1);
    for cache in [blocked, unknown] {
        let mut weights = Weights::open(std::slice::from_ref(&file)).unwrap();
        let error = cache
            .expand(&mut weights, ["h"], &mut |_| Ok(()))
            .unwrap_err();
        assert_eq!(error.code(), 7);
        let message = error.to_string();
        assert!(message.contains("set TRONIE_CACHE to"), "{message}");
        assert!(message.contains("`off`"), "{message}");
    }
}

#[test]
fn the_folder_is_where_the_environment_says() {
    let folder = |setting: Option<&str>, system: Option<&str>| {
        let cache = ExpansionCache::from_vars(setting.map(Into::into), system.map(Into::into));
        cache.folder().map(|f| f.to_string_lossy().into_owned())
    };
    assert_eq!(folder(Some("/a"), Some("/s")).unwrap(), "/a/weights");
    assert_eq!(folder(Some("/a"), None).unwrap(), "/a/weights");
    assert_eq!(folder(None, Some("/s")).unwrap(), "/s/tronie/weights");
    assert_eq!(folder(Some(""), Some("/s")).unwrap(), "/s/tronie/weights");
    assert_eq!(folder(Some("off"), Some("/s")), None);
    assert_eq!(folder(Some("./off"), None).unwrap(), "./off/weights");
    assert_eq!(folder(None, None), None);
}

#[test]
fn only_what_it_made_is_listed_and_removed() {
    let shop = Shop::new();
    let file = shop.saved("m.safetensors", &patterns());
    shop.expanded(&file);
    let folder = shop.cache.folder().unwrap().to_owned();
    let key = "0".repeat(64);
    let foreign = [
        format!("{key}.safetensors"),
        "notes.txt".into(),
        ".tronie-notes".into(),
        "sources/readme.json".into(),
    ];
    for name in &foreign {
        fs::write(folder.join(name), patterns()).unwrap();
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(&file, folder.join(".tronie-x.part")).unwrap();
    let entries = shop.entries();
    assert_eq!(entries.len(), 1);
    shop.cache.remove(&entries[0]).unwrap();
    assert!(shop.cache.remove_unfinished().unwrap());
    assert!(shop.entries().is_empty());
    for name in &foreign {
        assert!(folder.join(name).exists(), "{name}");
    }
    #[cfg(unix)]
    assert!(folder.join(".tronie-x.part").is_symlink() && file.exists());
    assert_eq!(fs::read_dir(folder.join("sources")).unwrap().count(), 1);
}
