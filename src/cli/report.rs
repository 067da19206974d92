//! `tronie models`, `inspect` and `doctor`.

use std::collections::BTreeSet;

use super::args::{CatalogueArgs, InspectArgs};
use super::console::print;
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::image::{is_png, read_request};
use crate::manifest::{Catalogue, FileRef, Model, Role};
use crate::model_file::ModelFile;
use crate::pipeline::LatentHandoff;
use crate::runtime;
use crate::weights::ExpansionCache;

const NO_LICENCE: &str = "licence unknown";

pub(super) fn models(args: &CatalogueArgs) -> Result<()> {
    let catalogue = Catalogue::open(args.models.as_deref())?;
    let hub = Hub::from_env()?;
    print(&catalogue.file.to_string())?;
    for (name, model) in &catalogue.models {
        print_model(name, model, &catalogue, &hub)?;
    }
    print_loras(&catalogue, &hub)?;
    Ok(())
}

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let request = if is_png(&args.file) {
        read_request(&args.file)?
    } else {
        LatentHandoff::load_request(&args.file)?
    };
    let text = serde_json::to_string_pretty(&request).map_err(|e| Error::Input {
        path: args.file.clone(),
        reason: e.to_string(),
    })?;
    print(&text)?;
    Ok(())
}

pub(super) fn doctor(args: &CatalogueArgs) -> Result<()> {
    print(&format!("tronie {}", env!("CARGO_PKG_VERSION")))?;
    let library = runtime::find_library(args.ort_lib.as_deref())?;
    print(&format!("library   {}", library.display()))?;
    for (provider, outcome) in runtime::providers(args.ort_lib.as_deref())? {
        match outcome {
            Ok(()) => print(&format!("provider  {provider:<7} works"))?,
            Err(Error::Provider { reason, .. }) => print(&format!(
                "provider  {provider:<7} not available: {}",
                first_line(&reason)
            ))?,
            Err(error) => return Err(error),
        }
    }
    let hub = Hub::from_env()?;
    print(&format!(
        "hub cache {}",
        hub.cache_dir()
            .map_or("none".into(), |p| p.display().to_string())
    ))?;
    let expansions = ExpansionCache::from_env();
    print(&format!(
        "expanded  {}",
        expansions.folder().map_or(
            "none: TRONIE_CACHE is off or no home directory is known".into(),
            |p| { p.display().to_string() }
        )
    ))?;
    let catalogue = Catalogue::open(args.models.as_deref())?;
    print(&format!("catalogue {}", catalogue.file))?;
    for (name, model) in &catalogue.models {
        print_model(name, model, &catalogue, &hub)?;
    }
    print_loras(&catalogue, &hub)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn print_model(name: &str, model: &Model, catalogue: &Catalogue, hub: &Hub) -> Result<()> {
    let role = match model.role {
        Role::Base => "base",
        Role::Refiner => "refiner",
    };
    let defaults = &model.defaults;
    let licence = model.licence.as_deref().unwrap_or(NO_LICENCE);
    let like = model.like.as_ref().map(|like| format!("as {like}, "));
    print(&format!(
        "  {name:<20} {role:<8} {}{}x{}, {} steps, {licence}; {}",
        like.unwrap_or_default(),
        defaults.width,
        defaults.height,
        defaults.steps,
        readiness(model, model.own_files(), catalogue, hub)
    ))?;
    // A variant has those of its base.
    let own = model.like.is_none().then_some(&model.adapters);
    for (name, adapter) in own.into_iter().flatten() {
        let keys = adapter.image_encoder.iter().chain([name]);
        let files = keys.filter_map(|key| model.weights.get(key)).flatten();
        print(&format!(
            "    {name:<18} {:<8} image prompts, {} tokens; {}",
            adapter.form.name(),
            adapter.tokens,
            readiness(model, files, catalogue, hub)
        ))?;
    }
    Ok(())
}

fn print_loras(catalogue: &Catalogue, hub: &Hub) -> Result<()> {
    for (name, lora) in &catalogue.loras {
        let licence = lora.licence.as_deref().unwrap_or(NO_LICENCE);
        let steps = lora
            .defaults
            .steps
            .map(|steps| format!(", {steps} steps"))
            .unwrap_or_default();
        let state = match &lora.file {
            FileRef::Path(path) => is_here(&catalogue.locate(path)),
            FileRef::Given(path) => is_here(&path.into()),
            FileRef::Hub(file) if hub.cached(file).is_some() => "ready".to_owned(),
            FileRef::Hub(file) => format!("to download on first use from {}", file.repo),
        };
        print(&format!(
            "  {name:<20} {:<8} for {}{steps}, {licence}; {state}",
            "lora",
            lora.family.name()
        ))?;
    }
    Ok(())
}

fn is_here(file: &ModelFile) -> String {
    if file.exists() {
        "ready".to_owned()
    } else {
        format!("{file} is missing")
    }
}

/// Which of some files of a model are absent, and of its graphs.
fn readiness<'a>(
    model: &Model,
    files: impl Iterator<Item = &'a FileRef>,
    catalogue: &Catalogue,
    hub: &Hub,
) -> String {
    let (mut to_download, mut from, mut missing) = (0, BTreeSet::new(), Vec::<ModelFile>::new());
    let mut look_for = |file: ModelFile| missing.extend(Some(file).filter(|file| !file.exists()));
    for file in files {
        match file {
            FileRef::Path(path) => look_for(catalogue.locate(path)),
            FileRef::Given(path) => look_for(path.into()),
            FileRef::Hub(file) if hub.cached(file).is_some() => {}
            FileRef::Hub(file) => {
                to_download += 1;
                from.insert(file.repo.as_str());
            }
        }
    }
    let graphs = model.graph_files().map(|path| catalogue.locate(path));
    graphs.for_each(look_for);
    match (missing.first(), to_download) {
        (Some(file), _) => format!("{} files missing, e.g. {file}", missing.len()),
        (None, 0) => "ready".to_owned(),
        (None, n) => {
            let from = from.into_iter().collect::<Vec<_>>().join(" and ");
            format!("{n} files to download on first use from {from}")
        }
    }
}
