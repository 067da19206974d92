//! Which entry of the catalogue a file is a model of: the one whose graphs find all their weights in it.
//!
//! Python twin: diffusers' `fetch_diffusers_config`, which knows a table of models instead.

use std::collections::{BTreeMap, BTreeSet};

use super::fault;
use super::recognise::Marks;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::manifest::{Catalogue, Model};
use crate::schedule::Prediction;
use crate::weights::Weights;

/// The key of a UNet's weights.
const UNET: &str = "unet";
/// Most entries of which is said why they do not fit.
const TOLD: usize = 3;

/// Why an entry does not fit.
enum Misfit {
    /// Another network.
    Unet(String),
    /// The same UNet, but something else is amiss.
    Rest(String),
}

/// The entry whose graphs and constants a file takes, with its name.
pub(super) fn entry<'c>(
    catalogue: &'c Catalogue,
    file: &Weights,
    marks: Marks,
) -> Result<(&'c str, &'c Model)> {
    let components = file.components()?;
    let (mut fitting, mut misfits) = (Vec::new(), Vec::new());
    // Variants have another model's graphs, and their own weights are what makes them.
    let whole = catalogue
        .models
        .iter()
        .filter(|(_, model)| model.like.is_none());
    for (name, model) in whole {
        match misfit(catalogue, model, &components)? {
            None => fitting.push((name.as_str(), model)),
            Some(misfit) => misfits.push((name.as_str(), misfit)),
        }
    }
    if fitting.is_empty() {
        return Err(fault(file, no_fit(catalogue, &misfits)));
    }
    fitting.retain(|(_, model)| model.vae.latents_mean.is_some() == marks.normalised);
    if fitting.is_empty() {
        let (its, others) = if marks.normalised {
            ("are", "are not")
        } else {
            ("are not", "are")
        };
        let reason = format!(
            "its latents {its} normalised channel by channel, and those of the models that it fits {others}: export its \
             model in the diffusers layout with `python -m export model`"
        );
        return Err(fault(file, reason));
    }
    let prediction = marks.prediction.unwrap_or(Prediction::Epsilon);
    if fitting
        .iter()
        .any(|(_, model)| marks.agrees(model, prediction))
    {
        fitting.retain(|(_, model)| marks.agrees(model, prediction));
    }
    // Entries that differ in their files only paint the same with this one.
    fitting.sort_by_key(|(_, model)| std::cmp::Reverse(model.adapters.len()));
    let (name, model) = fitting[0];
    if fitting
        .iter()
        .all(|(_, other)| same_constants(model, other))
    {
        return Ok((name, model));
    }
    let names = fitting.iter().map(|(name, _)| format!("`{name}`"));
    let reason = format!(
        "fits several models of {}, which differ in their constants: {}. Say which in an entry of the catalogue: \
         `like: {name}`, `checkpoint: FILE`",
        catalogue.file,
        names.collect::<Vec<_>>().join(", ")
    );
    Err(fault(file, reason))
}

/// Whether two entries paint the same with the same weights.
fn same_constants(a: &Model, b: &Model) -> bool {
    let of = |m: &Model| {
        let text = m.text.iter().map(|t| {
            let k = &t.tokenizer;
            (t.encoder.clone(), t.pooled, k.bos, k.eos, k.pad, k.length)
        });
        let flags = (m.force_zeros_for_empty_prompt, m.requires_aesthetics_score);
        (m.family, m.role, flags, text.collect::<Vec<_>>())
    };
    let networks = a.unet == b.unet && a.vae == b.vae && of(a) == of(b);
    networks && a.scheduler == b.scheduler && a.defaults == b.defaults
}

/// The first reason why a model's own graphs do not find their weights in the components; none if they do.
fn misfit(
    catalogue: &Catalogue,
    model: &Model,
    components: &BTreeMap<&'static str, Weights>,
) -> Result<Option<Misfit>> {
    let (mut absent, mut rest) = (BTreeSet::new(), None);
    // In the order of names, so the small graph of keys and values tells most strangers.
    for (_, graph) in model.own_graphs() {
        let key = graph.weights.as_str();
        let weights = components.get(key);
        if weights.is_none() {
            absent.insert(key);
        }
        let is_unet = key == UNET;
        let (Some(weights), Some(path)) = (weights, graph.files().next()) else {
            continue;
        };
        if rest.is_some() && !is_unet {
            continue;
        }
        match misfit_of(&Graph::load(catalogue.locate(path))?, weights)? {
            None => {}
            Some(reason) if is_unet => return Ok(Some(Misfit::Unet(reason))),
            reason => rest = reason,
        }
    }
    if absent.contains(UNET) {
        return Ok(Some(Misfit::Unet(lacks(UNET))));
    }
    let absent = absent.into_iter().map(lacks).collect::<Vec<_>>();
    let reason = if absent.is_empty() {
        rest
    } else {
        Some(absent.join(", and "))
    };
    Ok(reason.map(Misfit::Rest))
}

fn misfit_of(graph: &Graph, weights: &Weights) -> Result<Option<String>> {
    let needed = || graph.weights.iter();
    let weights = weights
        .clone()
        .named_as(needed().map(|weight| weight.name.as_str()));
    let needed = needed().map(|weight| (weight.name.as_str(), weight.shape.as_slice()));
    match weights.check(needed) {
        Ok(()) => Ok(None),
        Err(Error::Weights { reason, .. }) => Ok(Some(reason)),
        Err(error) => Err(error),
    }
}

/// What is said of a component that is not in a file.
pub(super) fn lacks(key: &str) -> String {
    let (what, names) = match key {
        "unet" => ("UNet", "model.diffusion_model.…"),
        "vae" => ("VAE", "first_stage_model.…"),
        "text_encoder" => (
            "first text encoder",
            "conditioner.embedders.0.transformer.…",
        ),
        "text_encoder_2" => (
            "OpenCLIP text encoder",
            "conditioner.embedders.0.model.… or conditioner.embedders.1.model.…",
        ),
        other => return format!("cannot hold the weights of `{other}`"),
    };
    format!("has no {what}: no tensor is called {names}")
}

/// Why no entry fits: what is amiss with those of the same UNet, else what differs from the others.
fn no_fit(catalogue: &Catalogue, misfits: &[(&str, Misfit)]) -> String {
    for (name, misfit) in misfits {
        if let Misfit::Rest(reason) = misfit {
            return format!(
                "{reason}. Its UNet is one of `{name}`: name a file that holds the whole model, or complete it in an \
                 entry of the catalogue: `like: {name}`, `checkpoint: FILE`, and under `weights` what it lacks"
            );
        }
    }
    let reasons = misfits.iter().take(TOLD).map(|(name, misfit)| {
        let (Misfit::Unet(reason) | Misfit::Rest(reason)) = misfit;
        format!("`{name}`: {reason}")
    });
    format!(
        "fits no model of {}: export its model in the diffusers layout with `python -m export model`. {}",
        catalogue.file,
        reasons.collect::<Vec<_>>().join("; ")
    )
}
