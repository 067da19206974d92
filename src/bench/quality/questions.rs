//! `quality.json`: what is asked of a model, and what the judge's numbers mean.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use crate::error::{Error, Result};
use crate::files::read_input;

/// The file's name in its folder.
const NAME: &str = "quality.json";
/// Some hundreds of questions are some pages of text.
const MAX_BYTES: u64 = 16 << 20;
/// The attribute that styles are values of.
pub(super) const STYLE: &str = "style";

/// The content of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Questions {
    /// The file.
    #[serde(skip)]
    pub path: PathBuf,
    /// What the judge chooses between, in the order of its logits.
    #[serde(deserialize_with = "in_order")]
    pub choices: Vec<Choice>,
    #[serde(default)]
    pub prompts: Vec<Prompt>,
    #[serde(default)]
    pub persons: Vec<Person>,
    #[serde(default)]
    pub styles: Vec<StyleOf>,
    #[serde(default)]
    pub both: Vec<Both>,
    #[serde(default)]
    pub loras: Vec<Lora>,
    #[serde(default)]
    pub with: With,
}

/// An attribute and its values.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    pub attribute: String,
    pub values: Vec<String>,
}

/// A prompt that names attributes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Prompt {
    #[serde(rename = "prompt")]
    pub text: String,
    pub seed: u64,
    /// Attribute to value.
    pub expect: BTreeMap<String, String>,
}

/// A person to be kept, and more pictures of the same person.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Person {
    pub picture: PathBuf,
    pub gallery: Vec<PathBuf>,
    pub prompt: String,
    pub seed: u64,
}

/// A picture whose style is to be taken.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StyleOf {
    pub picture: PathBuf,
    pub style: String,
    pub prompt: String,
    pub seed: u64,
}

/// A person, by place in the list of persons, in the style of a picture.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Both {
    pub person: usize,
    pub style_picture: PathBuf,
    pub style: String,
    pub prompt: String,
    pub seed: u64,
}

/// A LoRA, by name or file, and the style that it adds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lora {
    #[serde(rename = "lora")]
    pub name: String,
    pub style: String,
    pub prompt: String,
    pub seed: u64,
}

/// Names in the catalogue, and how strongly adapters are heard. What is left out is the demo model's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct With {
    pub face: String,
    pub style: String,
    pub refiner: String,
    pub lightning: String,
    pub face_scale: f64,
    pub style_scale: f64,
    pub both_face_scale: f64,
    pub both_style_scale: f64,
    pub refine_at: f64,
}

impl Default for With {
    fn default() -> Self {
        Self {
            face: "ip-adapter-plus-face".into(),
            style: "ip-adapter-plus".into(),
            refiner: "demo-refiner".into(),
            lightning: "demo-lightning".into(),
            face_scale: 0.95,
            style_scale: 1.0,
            both_face_scale: 0.95,
            both_style_scale: 0.6,
            refine_at: 0.8,
        }
    }
}

/// A map's entries as they are written; a sorted map would lose the order of the logits.
fn in_order<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Choice>, D::Error> {
    let map = serde_json::Map::deserialize(deserializer)?;
    let choices = map.into_iter().map(|(attribute, values)| {
        let values = serde_json::from_value(values).map_err(serde::de::Error::custom)?;
        Ok(Choice { attribute, values })
    });
    choices.collect()
}

impl Questions {
    /// Reads and checks a folder's questions.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        if !path.is_file() {
            let remedy = "name a folder with quality.json, judge.onnx.gz and judge.safetensors";
            return Err(Error::Missing {
                path,
                remedy: remedy.into(),
            });
        }
        let bytes = read_input(&path, MAX_BYTES)?;
        let parsed = serde_json::from_slice::<Self>(&bytes).map_err(|e| e.to_string());
        let checked = parsed.and_then(|questions| questions.check(folder).map(|()| questions));
        match checked {
            Ok(questions) => Ok(Self { path, ..questions }),
            Err(reason) => Err(Error::Input { path, reason }),
        }
    }

    /// The place of an attribute among the choices, and of a value among the attribute's.
    pub(super) fn place(&self, attribute: &str, value: &str) -> Result<(usize, usize), String> {
        let choice = self.choices.iter().position(|c| c.attribute == attribute);
        let known = || self.choices.iter().map(|c| c.attribute.as_str());
        let choice = choice.ok_or_else(|| {
            let known = known().collect::<Vec<_>>().join(", ");
            format!("`{attribute}` is no attribute of choices; known: {known}")
        })?;
        let values = &self.choices[choice].values;
        let found = values.iter().position(|known| known == value);
        let value = found.ok_or_else(|| {
            let known = values.join(", ");
            format!("`{value}` is no {attribute} of choices; known: {known}")
        })?;
        Ok((choice, value))
    }

    fn check(&self, folder: &Path) -> Result<(), String> {
        if let Some(empty) = self.choices.iter().find(|c| c.values.len() < 2) {
            return Err(format!("choices.{}: give two or more", empty.attribute));
        }
        for (i, prompt) in self.prompts.iter().enumerate() {
            for (attribute, value) in &prompt.expect {
                self.place(attribute, value)
                    .map_err(|e| format!("prompts[{i}].expect: {e}"))?;
            }
        }
        let styles = [
            ("styles", self.styles.iter().map(|s| &s.style).collect()),
            ("both", self.both.iter().map(|s| &s.style).collect()),
            ("loras", self.loras.iter().map(|s| &s.style).collect()),
        ];
        let styles: [(&str, Vec<&String>); 3] = styles;
        for (list, asked) in styles {
            for (i, style) in asked.into_iter().enumerate() {
                self.place(STYLE, style)
                    .map_err(|e| format!("{list}[{i}].style: {e}"))?;
            }
        }
        let persons = self.persons.len();
        if let Some(i) = self.both.iter().position(|both| both.person >= persons) {
            return Err(format!(
                "both[{i}].person: {} of {persons} persons, which are counted from 0",
                self.both[i].person
            ));
        }
        if let Some(i) = self.persons.iter().position(|p| p.gallery.is_empty()) {
            return Err(format!("persons[{i}].gallery: names no picture"));
        }
        let mut pictures = self.pictures();
        match pictures.find(|picture| !folder.join(picture).is_file()) {
            Some(absent) => Err(format!("names {}, which is not there", absent.display())),
            None => Ok(()),
        }
    }

    fn pictures(&self) -> impl Iterator<Item = &Path> {
        let persons = self.persons.iter();
        let persons = persons.flat_map(|p| p.gallery.iter().chain([&p.picture]));
        let styles = self.styles.iter().map(|s| &s.picture);
        let both = self.both.iter().map(|b| &b.style_picture);
        persons.chain(styles).chain(both).map(PathBuf::as_path)
    }
}
