//! `tronie schedulers`: what there is to choose, and a picture of the noise levels.

use std::path::Path;

use image::RgbImage;

use super::args::SchedulersArgs;
use super::chart::{Chart, Line};
use super::console::{print, say};
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::files::write_pending;
use crate::hub::Hub;
use crate::request::Request;
use crate::schedule::{Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use crate::schedulers::SchedulerKind;

pub(super) fn schedulers(args: &SchedulersArgs) -> Result<()> {
    for kind in SchedulerKind::ALL {
        let about = kind.about();
        print(&format!("{kind}  ({})", kind.class()))?;
        print(&format!("  {}", about.paper))?;
        print(&format!(
            "  order {}; {} model calls for n steps; noise: {}",
            about.order, about.calls, about.noise
        ))?;
        let curves = names(kind.curves().iter().map(|curve| curve.name()));
        let options = names(kind.knobs().iter().map(|knob| knob.name()));
        print(&format!("  sigmas {curves}; options {options}"))?;
    }
    match &args.draw {
        Some(path) => draw(args, path),
        None => Ok(()),
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

/// Draws every scheduler's curves into a PNG.
fn draw(args: &SchedulersArgs, path: &Path) -> Result<()> {
    if !path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("png"))
    {
        let reason = format!("{} does not end in .png", path.display());
        return Err(Error::request("draw", reason));
    }
    let config = config(args)?;
    let charts: Vec<Chart> = SchedulerKind::ALL
        .iter()
        .map(|kind| chart(*kind, &config, args.steps))
        .collect();
    let picture: RgbImage = super::chart::sheet(&charts);
    let pending = write_pending(path, |to| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .map_err(std::io::Error::other)?;
        to.write_all(bytes.get_ref())
    })?;
    pending.publish()?;
    say(&format!("wrote {}", path.display()));
    Ok(())
}

/// The scheduler configuration of the model that was named, or of the catalogue's default.
fn config(args: &SchedulersArgs) -> Result<SchedulerConfig> {
    let catalogue = Hub::from_env()?.catalogue(args.models.as_deref())?;
    if let Some(name) = &args.model {
        let named = Request {
            model: Some(name.clone()),
            ..Request::default()
        };
        checkpoint::open(&catalogue, &named)?;
        return Ok(catalogue.model("model", name)?.scheduler.clone());
    }
    if let Some(name) = catalogue.default_model() {
        return Ok(catalogue.model("model", name)?.scheduler.clone());
    }
    let known = names(catalogue.models.keys().map(String::as_str));
    Err(Error::request("model", format!("name one of: {known}")))
}

/// One scheduler's curves; those that a model's configuration rules out are left out with the reason.
fn chart(kind: SchedulerKind, config: &SchedulerConfig, steps: usize) -> Chart {
    let mut chart = Chart {
        title: kind.name().to_owned(),
        lines: Vec::new(),
    };
    let own = !kind.knobs().contains(&Knob::Sigmas);
    for curve in kind.curves() {
        let options = SamplingOptions {
            sigmas: (!own).then_some(*curve),
            ..SamplingOptions::steps(steps)
        };
        match kind.plan(config, &options) {
            Ok(schedule) => chart.lines.push(line(*curve, &schedule)),
            Err(error) => say(&format!("{kind}, {curve}: {error}")),
        }
    }
    chart
}

fn line(curve: SigmaCurve, schedule: &Schedule) -> Line {
    Line {
        name: curve.name(),
        colour: match curve {
            SigmaCurve::Normal => [40, 40, 40],
            SigmaCurve::Karras => [214, 90, 20],
            SigmaCurve::Exponential => [20, 120, 190],
            SigmaCurve::Beta => [30, 150, 70],
            SigmaCurve::Ays => [150, 60, 170],
        },
        sigmas: schedule.sigmas.clone(),
    }
}
