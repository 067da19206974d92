//! The words that a LoRA was trained to, out of what its maker wrote into the file.
//!
//! Python twin: the `ss_*` metadata of kohya's sd-scripts and the fields of Stability's ModelSpec; diffusers writes none.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Fields that name the words themselves.
const PHRASES: &[&str] = &[
    "modelspec.trigger_phrase",
    "modelspec.trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
    "instance_prompt",
    "activation text",
    "ss_trigger_words",
];
/// Captions' tags by folder of the training pictures: how often each was there.
const TAGS: &str = "ss_tag_frequency";
/// Folders of the training pictures, in the way of sd-scripts: `10_sks dog` is ten times the class `sks dog`.
const FOLDERS: &str = "ss_dataset_dirs";
/// The same of pictures that are there to keep a class as it was: nobody has to write their captions.
const REGULAR_FOLDERS: &str = "ss_reg_dataset_dirs";
/// Tags of captions that are told at most.
const MOST_TAGS: usize = 20;

/// A word or phrase that a file tells to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trigger {
    /// What to write in the prompt.
    pub phrase: String,
    /// The key of the metadata that has it.
    pub source: String,
    /// How many captions had it, for tags of captions.
    pub count: Option<u64>,
}

#[derive(Deserialize)]
struct Folder {
    #[serde(default)]
    img_count: Option<u64>,
}

/// The phrases that a file names, those of its training folders, and its most frequent tags, in this order.
pub(super) fn triggers(metadata: &BTreeMap<String, String>) -> Vec<Trigger> {
    let mut found: Vec<Trigger> = Vec::new();
    let mut add = |phrase: &str, source: &str, count| {
        let phrase = phrase.trim();
        if !phrase.is_empty() && found.iter().all(|trigger| trigger.phrase != phrase) {
            found.push(Trigger {
                phrase: phrase.to_owned(),
                source: source.to_owned(),
                count,
            });
        }
    };
    for key in PHRASES {
        if let Some(text) = metadata.get(*key) {
            // Some tools write a list as JSON.
            match serde_json::from_str::<Vec<String>>(text) {
                Ok(list) => list.iter().for_each(|phrase| add(phrase, key, None)),
                Err(_) => add(text, key, None),
            }
        }
    }
    let folders: Option<BTreeMap<String, Folder>> = read(metadata, FOLDERS);
    for (name, folder) in folders.iter().flatten() {
        if let Some(class) = class(name) {
            add(class, FOLDERS, folder.img_count);
        }
    }
    let tags: Option<BTreeMap<String, BTreeMap<String, u64>>> = read(metadata, TAGS);
    let regular: BTreeMap<String, Folder> = read(metadata, REGULAR_FOLDERS).unwrap_or_default();
    let trained = tags.iter().flatten();
    let trained = trained.filter(|(folder, _)| !regular.contains_key(*folder));
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (tag, count) in trained.flat_map(|(_, tags)| tags) {
        let sum = counts.entry(tag.trim()).or_default();
        *sum = sum.saturating_add(*count);
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (tag, count) in counts.into_iter().take(MOST_TAGS) {
        add(tag, TAGS, Some(count));
    }
    found
}

fn read<T: for<'a> Deserialize<'a>>(metadata: &BTreeMap<String, String>, key: &str) -> Option<T> {
    // What a trainer wrote in another way tells nothing, and is no fault of the weights.
    serde_json::from_str(metadata.get(key)?).ok()
}

/// The class in a folder's name, `sks dog` of `10_sks dog`.
fn class(folder: &str) -> Option<&str> {
    let (repeats, class) = folder.split_once('_')?;
    repeats.parse::<u32>().ok().map(|_| class)
}
