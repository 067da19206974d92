//! LoRAs: low-rank changes of a model's weights, each with the strength that a request gives it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::quoted;

/// The command line's form.
const FORM: &str = "FILE[@SCALE][:te=SCALE]";
/// What begins the scale of the text encoders.
const TE: &str = ":te=";

/// A LoRA and how strongly it changes the model.
///
/// Its text form, which the command line takes, is `FILE[@SCALE][:te=SCALE]`. The last `@` begins the scale, so a file with
/// `@` or `:te=` in its name needs a scale after it.
///
/// Twin: diffusers' `load_lora_weights` with `set_adapters`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LoraUse {
    /// A name of the catalogue's `loras`, otherwise a `.safetensors` file.
    pub lora: String,
    /// What its change of the UNet is multiplied by; negative takes the opposite.
    #[serde(default = "one")]
    pub scale: f64,
    /// The same for the text encoders; absent means `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub te_scale: Option<f64>,
}

const fn one() -> f64 {
    1.0
}

impl LoraUse {
    /// What its change of a component's weights is multiplied by, by their key into [`Model::weights`].
    ///
    /// [`Model::weights`]: crate::manifest::Model::weights
    pub fn scale_of(&self, weights: &str) -> f64 {
        if weights.starts_with("text_encoder") {
            self.te_scale.unwrap_or(self.scale)
        } else {
            self.scale
        }
    }

    /// Whether it changes nothing: all its scales are 0.
    pub fn is_off(&self) -> bool {
        self.scale == 0.0 && self.te_scale.unwrap_or(self.scale) == 0.0
    }
}

/// What changes a base model: the LoRAs of a request that change anything, in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraSet {
    /// The model's name in the catalogue.
    pub model: String,
    /// The LoRAs.
    pub uses: Vec<LoraUse>,
    /// Whether those with modules that the model does not have are applied as far as they fit.
    pub lenient: bool,
}

impl FromStr for LoraUse {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (lora, scales) = match text.rsplit_once('@') {
            Some((lora, scales)) => (lora, Some(scales)),
            None => (text, None),
        };
        let (before, te_scale) = match scales.unwrap_or(text).rsplit_once(TE) {
            Some((before, te)) => (before, Some(number(te)?)),
            None => (scales.unwrap_or(text), None),
        };
        let (lora, scale) = match scales {
            Some(_) => (lora, number(before)?),
            None => (before, one()),
        };
        if lora.is_empty() {
            return Err(format!("{} names no file: {FORM}", quoted(text)));
        }
        Ok(Self {
            lora: lora.to_owned(),
            scale,
            te_scale,
        })
    }
}

fn number(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| n.is_finite());
    number.ok_or_else(|| {
        format!(
            "{} is no scale, which is a finite number, in {FORM}; a file with @ or {TE} in its name needs a scale after it, \
             such as @1",
            quoted(text)
        )
    })
}

impl fmt::Display for LoraUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lora)?;
        if self.scale.to_bits() != one().to_bits()
            || self.lora.contains('@')
            || self.lora.contains(TE)
        {
            write!(f, "@{}", self.scale)?;
        }
        self.te_scale.map_or(Ok(()), |te| write!(f, "{TE}{te}"))
    }
}
