//! What can be measured of pictures.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::quoted;

/// What is measured, each with pictures of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// Whether the attributes that prompts name are there.
    Text,
    /// Whether the adapter of faces keeps persons apart.
    Identity,
    /// Whether the adapter of styles takes the style.
    Style,
    /// Both adapters at once.
    Both,
    /// What the refiner adds to the pictures of `Text`.
    Refiner,
    /// What few steps lose against the pictures of `Text`.
    Lightning,
    /// Whether LoRAs of styles add them.
    Lora,
}

impl Subject {
    /// All of them, in the order in which they are measured.
    pub const ALL: [Self; 7] = [
        Self::Text,
        Self::Identity,
        Self::Style,
        Self::Both,
        Self::Refiner,
        Self::Lightning,
        Self::Lora,
    ];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Identity => "identity",
            Self::Style => "style",
            Self::Both => "both",
            Self::Refiner => "refiner",
            Self::Lightning => "lightning",
            Self::Lora => "lora",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|subject| subject.name() == text);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("{} is none of: {known}", quoted(text))
        })
    }
}
