//! What the layers see: a picture is painted with one `LoRA`, and its steps are run again with more outputs.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array1, Ix2, s};
use rayon::prelude::*;

use super::Zipping;
use crate::error::{Error, Result};
use crate::lora::{Mergers, Moments, Pair};
use crate::memory;
use crate::pipeline::Pipeline;
use crate::pipeline::sources::lay_out;
use crate::plan::{Guidance, Plan, UnetForm, names};
use crate::progress::{Control, Event, Observer};
use crate::request::Resolved;
use crate::runtime::Session;
use crate::tensor::{Latents, Tensor, TensorMap, all_finite};

/// Bytes for outputs and moments where the system does not tell what is free.
const UNTOLD: u64 = 2 << 30;
/// Bytes for them at the least.
const LEAST: u64 = 256 << 20;

/// A painted batch: the plan, and what the `UNet` was given on the way.
pub(super) struct Run {
    pub(super) resolved: Resolved,
    pub(super) plan: Plan,
    pub(super) visits: Vec<Visit>,
}

/// One evaluation of the `UNet`.
pub(super) struct Visit {
    /// Zero-based step.
    step: usize,
    /// The input `[batch, channels, height, width]`.
    x: Latents,
    timestep: f64,
}

/// A tensor of the `UNet` that flows into layers with mergers.
struct Watched {
    tensor: String,
    layers: Vec<String>,
    inputs: usize,
    /// Tokens of a picture.
    rows: usize,
}

impl Watched {
    /// Bytes of the moments of both sides, and of the output that they are made of.
    fn bytes(&self) -> u64 {
        2 * Moments::bytes(self.inputs) + 8 * (self.rows * self.inputs) as u64
    }
}

impl Pipeline {
    /// The mergers of all layers of a pair.
    pub(super) fn mergers(
        &self,
        pair: &Pair<'_>,
        zipping: &Zipping,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<String, Mergers>> {
        let runs = [
            self.painted(zipping, 0, observer)?,
            self.painted(zipping, 1, observer)?,
        ];
        let name = &runs[0].resolved.model;
        let kv = self.graph(name, names::KV)?;
        let in_kv = |layer: &str| kv.weights.iter().any(|w| w.name == weight_of(layer));
        let (of_text, of_unet): (Vec<_>, Vec<_>) =
            pair.layers().partition(|(layer, _)| in_kv(layer));
        let mut mergers = BTreeMap::new();
        let bound = memory::available().map_or(UNTOLD, |free| (free / 4).max(LEAST));
        if let Some((_, inputs)) = of_text.first() {
            let seen = [
                self.told(&runs[0], *inputs, observer)?,
                self.told(&runs[1], *inputs, observer)?,
            ];
            let jobs = of_text
                .iter()
                .map(|(layer, _)| (*layer, [&seen[0], &seen[1]]));
            solve(
                pair,
                &jobs.collect::<Vec<_>>(),
                zipping,
                bound,
                &mut mergers,
            )?;
        }
        let watched = self.watched(&runs[0], &of_unet)?;
        let groups = groups(watched, bound);
        for (at, group) in groups.iter().enumerate() {
            let note = format!("layers, part {} of {}", at + 1, groups.len());
            self.notify(observer, Event::Note(&note), 0)?;
            let seen = [
                self.seen(&runs[0], group, observer)?,
                self.seen(&runs[1], group, observer)?,
            ];
            let mut jobs = Vec::new();
            for (watched, (content, style)) in group.iter().zip(seen[0].iter().zip(&seen[1])) {
                let layers = watched.layers.iter();
                jobs.extend(layers.map(|layer| (layer.as_str(), [content, style])));
            }
            solve(pair, &jobs, zipping, bound, &mut mergers)?;
        }
        Ok(mergers)
    }

    /// Paints a side's batch with its own `LoRA`.
    pub(super) fn painted(
        &self,
        zipping: &Zipping,
        side: usize,
        observer: &mut Observer<'_>,
    ) -> Result<Run> {
        let loras = std::slice::from_ref(&zipping.loras[side]);
        let resolved = self.zip_request(zipping, side, loras, observer)?;
        let schedule = self.schedule(&resolved)?;
        let steps = schedule.steps();
        let plan = self.prepare(&resolved, schedule, &(0..steps), observer)?;
        let from = self.first_latents(&plan, &resolved);
        let mut visits = Vec::new();
        let mut watch = |event: Event<'_>| -> Control {
            if let Event::ModelOutput {
                step,
                timestep,
                input,
                ..
            } = event
            {
                visits.push(Visit {
                    step,
                    x: input.clone(),
                    timestep,
                });
            }
            observer(event)
        };
        self.denoise(&plan, from, steps, &mut watch)?;
        Ok(Run {
            resolved,
            plan,
            visits,
        })
    }

    /// What the layers see that make keys and values of the text: its embeddings.
    fn told(&self, run: &Run, inputs: usize, observer: &mut Observer<'_>) -> Result<Moments> {
        let (resolved, schedule) = (&run.resolved, &run.plan.schedule);
        let guidance = Guidance::of(resolved, schedule);
        let cuts = self.cuts(resolved, schedule, &guidance, &(0..schedule.steps()))?;
        let mut moments = Moments::new(inputs);
        for cut in cuts {
            let told = cut.negative.iter().chain([&cut.positive]).cloned();
            let told = told.collect::<Vec<_>>();
            let reads = self.read(resolved, &resolved.model, &told, observer)?;
            let chunks = reads.iter().map(super::super::Read::chunks).max();
            let positive = reads.last().map(|read| (read, chunks.unwrap_or(0)));
            let encoded = positive
                .map(|positive| self.encode(resolved, &resolved.model, &[positive], observer));
            for encoded in encoded.transpose()?.unwrap_or_default() {
                moments.add(&encoded.hidden.view());
            }
        }
        Ok(moments)
    }

    /// The tensors that flow into layers of the `UNet`.
    fn watched(&self, run: &Run, layers: &[(&str, usize)]) -> Result<Vec<Watched>> {
        let name = &run.resolved.model;
        let facts = &self.catalogue().model("model", name)?.unet;
        let [.., height, width] = run.plan.latents;
        let grids = facts.grids(height, width);
        let weights = layers.iter().map(|(layer, _)| weight_of(layer));
        let weights = weights.collect::<Vec<_>>();
        let mut graph = self.graph(name, names::UNET)?;
        let tensors = graph.watch(weights.iter().map(String::as_str));
        let tensors = tensors.map_err(|weight| no_layer(&weight))?;
        let mut watched = BTreeMap::<String, Watched>::new();
        for ((layer, inputs), tensor) in layers.iter().zip(tensors) {
            let module = facts.attentions.iter();
            let mut module = module.filter(|a| layer.starts_with(&format!("{}.", a.name)));
            let grid = module.next().and_then(|a| grids.get(&a.factor));
            let entry = watched.entry(tensor.clone()).or_insert(Watched {
                tensor,
                layers: Vec::new(),
                inputs: *inputs,
                rows: grid.map_or(height * width, |(h, w)| h * w),
            });
            entry.layers.push((*layer).to_owned());
        }
        Ok(watched.into_values().collect())
    }

    /// What flows through some tensors in all steps of a run, where the `UNet` is told the prompt.
    fn seen(
        &self,
        run: &Run,
        group: &[Watched],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Moments>> {
        let resolved = &run.resolved;
        let weights = group.iter().filter_map(|watched| watched.layers.first());
        let weights = weights
            .map(|layer| weight_of(layer))
            .collect::<BTreeSet<_>>();
        let mut graph = self.graph(&resolved.model, names::UNET)?;
        let weights = weights.iter().map(String::as_str);
        graph.watch(weights).map_err(|weight| no_layer(&weight))?;
        let loading = self.loading(resolved.memory(), &resolved.lora_set(), observer)?;
        let unet = (resolved.model.as_str(), names::UNET.into());
        let mut session = self.session_of(graph, unet, &loading, observer)?;
        let moments = group.iter().map(|watched| Moments::new(watched.inputs));
        let mut moments = moments.collect::<Vec<_>>();
        visit(&run.plan, &run.visits, &mut session, |mut outputs| {
            let seen = group
                .iter()
                .map(|watched| match outputs.remove(&watched.tensor) {
                    Some(Tensor::F32(seen)) => seen.into_dimensionality::<Ix2>().ok(),
                    _ => None,
                });
            let seen = seen
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| Error::Contract {
                    graph: names::UNET.into(),
                    tensor: "what flows into a layer".into(),
                    expected: "f32 [rows, inputs]".into(),
                    actual: "another".into(),
                })?;
            let pairs = moments.par_iter_mut().zip(seen);
            pairs.for_each(|(moments, seen)| moments.add(&seen.view()));
            Ok(())
        })?;
        Ok(moments)
    }
}

/// Runs the `UNet` over all visits, picture by picture, as a plan tells it the prompt; hands on its outputs.
pub(super) fn visit(
    plan: &Plan,
    visits: &[Visit],
    session: &mut Session,
    mut take: impl FnMut(TensorMap) -> Result<()>,
) -> Result<()> {
    for visit in visits {
        let mut segments = plan.segments.iter();
        let segment = segments.find(|segment| segment.steps.contains(&visit.step));
        let branch = segment.and_then(|s| plan.branches.get(s.positive));
        let Some(branch) = branch else { continue };
        let timestep = Tensor::from(Array1::from_elem(1, visit.timestep as f32));
        let fixed = lay_out(&[branch], 1, &UnetForm::Text)?;
        for picture in 0..visit.x.dim().0 {
            let sample = visit.x.slice(s![picture..=picture, .., .., ..]);
            let sample = Tensor::from(sample.to_owned());
            let mut feeds = vec![(names::SAMPLE, &sample), (names::TIMESTEP, &timestep)];
            feeds.extend(fixed.iter().map(|(name, tensor)| (name.as_str(), tensor)));
            let outputs = session.run(&feeds)?;
            let finite =
                matches!(outputs.get(names::OUT_SAMPLE), Some(Tensor::F32(out)) if all_finite(out));
            if !finite {
                return Err(Error::NonFinite {
                    component: names::UNET.into(),
                    step: Some(visit.step),
                    remedy: "check the LoRAs and the checkpoint",
                });
            }
            take(outputs)?;
        }
    }
    Ok(())
}

/// Solves layers in parallel, as many at a time as the bound has room for.
fn solve(
    pair: &Pair<'_>,
    jobs: &[(&str, [&Moments; 2])],
    zipping: &Zipping,
    bound: u64,
    into: &mut BTreeMap<String, Mergers>,
) -> Result<()> {
    let most = jobs.iter().map(|(_, seen)| seen[0].bytes_to_solve()).max();
    let lanes = (bound / most.unwrap_or(1).max(1)).max(1) as usize;
    for lane in jobs.chunks(lanes) {
        let solved = lane.par_iter().map(|(layer, seen)| {
            let mergers = pair.solve(layer, *seen, zipping.terms)?;
            Ok(((*layer).to_owned(), mergers))
        });
        into.extend(solved.collect::<Result<Vec<_>>>()?);
    }
    Ok(())
}

/// Tensors in groups whose outputs and moments stay below a bound, but one at least.
fn groups(watched: Vec<Watched>, bound: u64) -> Vec<Vec<Watched>> {
    let mut groups: Vec<Vec<Watched>> = Vec::new();
    let mut held = 0;
    for watched in watched {
        let bytes = watched.bytes();
        if let Some(group) = groups.last_mut().filter(|_| held + bytes <= bound) {
            group.push(watched);
        } else {
            held = 0;
            groups.push(vec![watched]);
        }
        held += bytes;
    }
    groups
}

fn no_layer(weight: &str) -> Error {
    Error::Contract {
        graph: names::UNET.into(),
        tensor: weight.to_owned(),
        expected: "a linear layer of its own".into(),
        actual: "none: export the model again".into(),
    }
}

fn weight_of(layer: &str) -> String {
    format!("{layer}.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_every_tensor_once_and_stay_below_the_bound() {
        let watched = (0..9).map(|at| Watched {
            tensor: format!("v{at}"),
            layers: Vec::new(),
            inputs: 10 + at,
            rows: 5,
        });
        let each = watched.clone().map(|w| w.bytes()).max().unwrap_or(0);
        for (bound, count) in [(0, 9), (3 * each, 3), (u64::MAX / 2, 1)] {
            let groups = groups(watched.clone().collect(), bound);
            assert!(groups.len() <= count, "{} groups", groups.len());
            let names = groups.iter().flatten().map(|w| w.tensor.clone());
            assert!(names.eq((0..9).map(|at| format!("v{at}"))));
            for group in groups.iter().filter(|group| group.len() > 1) {
                assert!(group.iter().map(Watched::bytes).sum::<u64>() <= bound);
            }
        }
    }
}
