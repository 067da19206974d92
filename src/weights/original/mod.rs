//! SDXL's original layout (Stability's `sgm`): a whole model in one file, under the names that its authors gave.
//!
//! Every tensor of such a file that a component has becomes a [`View`]: the diffusers name, and what is taken of the
//! stored tensor. The tables of names are per component; what no table has (EMA copies, an optimiser's state) is left
//! alone.
//!
//! Python twin: diffusers' `loaders/single_file_utils.py`.

mod text;
mod unet;
mod vae;

use std::collections::BTreeMap;

pub use unet::UnetNames;

use super::view::View;

/// Components by the beginning of their names, and the catalogue's key of their weights. `OpenCLIP`'s text encoder is the
/// second of SDXL and the only one of its refiner, which calls it `text_encoder_2` too.
pub(crate) const PREFIXES: &[(&str, &str)] = &[
    (UNET, "unet"),
    (VAE, "vae"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
];
pub(crate) const UNET: &str = "model.diffusion_model.";
pub(crate) const VAE: &str = "first_stage_model.";

/// The views of every component, by the catalogue's key, in a file whose tensors have these names and numbers of
/// dimensions.
pub(super) fn views<'a>(
    tensors: impl Iterator<Item = (&'a str, usize)>,
) -> BTreeMap<&'static str, Vec<View>> {
    let mut parts = BTreeMap::<&str, (&'static str, Vec<(&str, usize)>)>::new();
    for (name, rank) in tensors {
        let prefixed = PREFIXES
            .iter()
            .find_map(|&(prefix, key)| Some((prefix, key, name.strip_prefix(prefix)?)));
        if let Some((prefix, key, rest)) = prefixed {
            let (_, names) = parts.entry(prefix).or_insert((key, Vec::new()));
            names.push((rest, rank));
        }
    }
    let mut views = BTreeMap::<_, Vec<_>>::new();
    for (prefix, (key, names)) in parts {
        let found = match key {
            "unet" => {
                let unet = UnetNames::of_original(names.iter().map(|(name, _)| *name));
                let names = names.iter();
                names
                    .filter_map(|(name, _)| Some(View::whole(unet.diffusers(name)?, name)))
                    .collect()
            }
            "vae" => vae::views(&names),
            "text_encoder" => text::clip(&names),
            _ => text::open_clip(&names),
        };
        let found = found.into_iter().map(|view| view.under(prefix));
        views.entry(key).or_default().extend(found);
    }
    views
}

fn number(part: Option<&str>) -> Option<usize> {
    part?.parse().ok()
}

/// The name with the module at its beginning replaced, if that is in the table.
fn replaced(table: &[(&str, &str)], name: &str) -> Option<String> {
    table.iter().find_map(|(from, to)| moved(from, to, name))
}

/// [`replaced`] from the second column to the first.
fn replaced_back(table: &[(&str, &str)], name: &str) -> Option<String> {
    table.iter().find_map(|(to, from)| moved(from, to, name))
}

fn moved(from: &str, to: &str, name: &str) -> Option<String> {
    let rest = name.strip_prefix(from)?;
    (rest.is_empty() || rest.starts_with('.')).then(|| format!("{to}{rest}"))
}
