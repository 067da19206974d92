//! Image prompts: pictures that the UNet sees beside the text.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Crop, ImageScale, Share};
use crate::error::{Error, Result, quoted};
use crate::manifest::Attention;

/// The command line's form.
const FORM: &str = "NAME=FILE[,FILE…][@SCALE][@mask=FILE[,FILE…]][@steps=START,END][@negative=FILE]\
                    [@crop=center|pad|stretch][@face=FILE[,FILE…]][@negative-face=FILE][@shortcut=SCALE]";

/// Pictures that the UNet sees beside the text, through one adapter.
///
/// Its text form, which the command line takes, is
/// `NAME=FILE[,FILE…][@SCALE][@mask=FILE[,FILE…]][@steps=START,END][@negative=FILE][@crop=center|pad|stretch]`, and for
/// adapters of faces besides `[@face=FILE[,FILE…]][@negative-face=FILE][@shortcut=SCALE]`. The name ends at the first `=`;
/// `@` begins a part and `,` the next file, so files with one of the two in their names can be named in JSON only.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImagePrompt {
    /// Name of the adapter in the model's entry of the catalogue.
    pub adapter: String,
    /// The pictures, or saved embeddings of them (`.safetensors`); for adapters that read the identities of faces,
    /// `FaceID`'s, files of those (`.safetensors`, `.npy`). Without masks they are seen together.
    pub pictures: Vec<PathBuf>,
    /// Pictures of the faces, or saved embeddings of them, one for each identity, where the adapter sees both.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faces: Vec<PathBuf>,
    /// How strongly the UNet listens; absent means 1 everywhere. A list has one for each masked picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<ImageScale>,
    /// Where each of the pictures rules: white there, black elsewhere; as many as pictures, or none. Masked pictures are
    /// seen one by one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub masks: Vec<PathBuf>,
    /// In which share of the steps it rules; absent means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Share>,
    /// What the negative branch of guidance sees instead of nothing: a picture, or an identity, as in `pictures`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative: Option<PathBuf>,
    /// The picture of the negative identity's face, where the adapter sees both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_face: Option<PathBuf>,
    /// How pictures become square; absent means their centre.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crop: Option<Crop>,
    /// How much of what is seen of the faces is added to what their identities say, where the adapter sees both; absent
    /// means 1. The reference's `s_scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortcut: Option<f64>,
}

impl FromStr for ImagePrompt {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (adapter, rest) = text
            .split_once('=')
            .filter(|(adapter, _)| !adapter.is_empty())
            .ok_or_else(|| format!("{} is not {FORM}", quoted(text)))?;
        let mut parts = rest.split('@');
        let mut prompt = Self {
            adapter: adapter.to_owned(),
            pictures: files("NAME", parts.next().unwrap_or_default())?,
            ..Self::default()
        };
        parts.try_for_each(|part| prompt.take(part))?;
        Ok(prompt)
    }
}

impl ImagePrompt {
    /// Takes one of the parts that `@` begins.
    fn take(&mut self, part: &str) -> Result<(), String> {
        let json = "a file with @ in its name can be named in a request's JSON only";
        let (name, value) = match part.split_once('=') {
            Some((name, value)) if !part.starts_with('{') => (Some(name), value),
            _ => (None, part),
        };
        let again = match name {
            None => {
                let scale = value.parse().map_err(|e| format!("{e}; {json}"))?;
                self.scale.replace(scale).is_some()
            }
            Some("mask") => !std::mem::replace(&mut self.masks, files("mask", value)?).is_empty(),
            Some("steps") => self.steps.replace(value.parse()?).is_some(),
            Some("crop") => self.crop.replace(value.parse()?).is_some(),
            Some("face") => !std::mem::replace(&mut self.faces, files("face", value)?).is_empty(),
            Some("shortcut") => self.shortcut.replace(shortcut(value)?).is_some(),
            Some(name @ ("negative" | "negative-face")) if value.is_empty() => {
                return Err(format!("{name} names no file"));
            }
            Some("negative") => self.negative.replace(value.into()).is_some(),
            Some("negative-face") => self.negative_face.replace(value.into()).is_some(),
            Some(_) => {
                return Err(format!(
                    "{} is not known; known after @: SCALE, mask=, steps=, negative=, crop=, face=, negative-face=, \
                     shortcut=; {json}",
                    quoted(part)
                ));
            }
        };
        if again {
            return Err(format!("has {} twice", name.unwrap_or("SCALE")));
        }
        Ok(())
    }

    /// The scale of each of a UNet's `attentions`, in their order ([`ImageScale::per_layer`]): for each masked picture,
    /// or once for all.
    ///
    /// # Errors
    /// Those of [`ImageScale::per_layer`].
    pub fn scales(&self, attentions: &[Attention]) -> Result<Vec<Vec<f64>>> {
        let scale = self.scale.clone().unwrap_or_default();
        let count = self.masks.len().max(1);
        (0..count)
            .map(|picture| scale.per_layer(picture, attentions))
            .collect()
    }

    /// Every file that it names.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let lists = [&self.pictures, &self.faces, &self.masks];
        let files = lists.into_iter().flatten();
        files.chain(&self.negative).chain(&self.negative_face)
    }

    /// Whether the files of a prompt in text form are there.
    ///
    /// # Errors
    /// [`Error::Input`] that names the file, and the way around the signs that separate files.
    pub fn check_files(&self) -> Result<()> {
        match self.files().find(|file| !file.exists()) {
            None => Ok(()),
            Some(missing) => Err(Error::Input {
                path: missing.clone(),
                reason: "is not there, though image-prompt names it; `@` and `,` separate parts and files: files with one \
                         of them in their names can be named in a request's JSON only (`image-prompts`)"
                    .into(),
            }),
        }
    }
}

fn shortcut(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| n.is_finite());
    number.ok_or_else(|| format!("{} is no shortcut: a finite number", quoted(text)))
}

fn files(what: &str, list: &str) -> Result<Vec<PathBuf>, String> {
    let files = list.split(',').map(PathBuf::from).collect::<Vec<_>>();
    if files.iter().any(|file| file.as_os_str().is_empty()) {
        return Err(format!(
            "{} has an empty file name in {what}=FILE[,FILE…]",
            quoted(list)
        ));
    }
    Ok(files)
}

impl fmt::Display for ImagePrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |files: &[PathBuf]| {
            let files = files.iter().map(|file| file.display().to_string());
            files.collect::<Vec<_>>().join(",")
        };
        write!(f, "{}={}", self.adapter, joined(&self.pictures))?;
        if let Some(scale) = &self.scale {
            write!(f, "@{scale}")?;
        }
        if !self.masks.is_empty() {
            write!(f, "@mask={}", joined(&self.masks))?;
        }
        if let Some(steps) = &self.steps {
            write!(f, "@steps={steps}")?;
        }
        if let Some(negative) = &self.negative {
            write!(f, "@negative={}", negative.display())?;
        }
        if let Some(crop) = &self.crop {
            write!(f, "@crop={crop}")?;
        }
        if !self.faces.is_empty() {
            write!(f, "@face={}", joined(&self.faces))?;
        }
        if let Some(face) = &self.negative_face {
            write!(f, "@negative-face={}", face.display())?;
        }
        if let Some(shortcut) = &self.shortcut {
            write!(f, "@shortcut={shortcut}")?;
        }
        Ok(())
    }
}
