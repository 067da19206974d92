//! Pictures become attention sources: encoder, projection, keys and values, each network loaded once for a request.
//!
//! Twin: `prepare_ip_adapter_image_embeds` of diffusers' `StableDiffusionXLPipeline` and `IPAdapterAttnProcessor2_0`,
//! whose scale of a layer is folded into its values here: attention is linear in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ndarray::{Array2, Axis, concatenate};

use super::Pipeline;
use super::image_embedding::{ImageEmbedding, Sight};
use super::projection::{Identities, Projection, Shown, read_identities};
use crate::error::{Error, Result};
use crate::image::{area_at, area_mask};
use crate::manifest::{Adapter, AdapterForm, Attention, Model};
use crate::plan::{Areas, AttentionSource, KeysValues, names};
use crate::progress::{Observer, Stage};
use crate::request::{ImagePrompt, Resolved};

/// What a UNet looks at for one image prompt: one source, or one for each masked picture.
#[derive(Debug, Default)]
pub(super) struct ImageSources {
    positive: Vec<Arc<AttentionSource>>,
    /// As many, of the unconditional picture; none where no step has guidance.
    negative: Vec<Arc<AttentionSource>>,
}

impl ImageSources {
    pub(super) fn of(&self, negative: bool) -> &[Arc<AttentionSource>] {
        if negative {
            &self.negative
        } else {
            &self.positive
        }
    }
}

/// Pictures that cross-attention sees together, and the mask that says where.
struct Group<'a> {
    positive: Vec<Shown>,
    /// As many, so that both branches have as many tokens; none without guidance.
    negative: Vec<Shown>,
    mask: Option<&'a Path>,
    /// What the mask weighs places with.
    areas: Option<Areas>,
}

/// The image prompts of one adapter with one shortcut, by their places in the request.
struct Work<'a> {
    adapter: &'a str,
    facts: &'a Adapter,
    shortcut: f64,
    identities: Identities,
    prompts: Vec<(usize, &'a ImagePrompt, Vec<Group<'a>>)>,
}

impl Work<'_> {
    fn shown(&self) -> impl Iterator<Item = &Vec<Shown>> {
        let groups = self.prompts.iter().flat_map(|(.., groups)| groups);
        let both = groups.flat_map(|group| [&group.positive, &group.negative]);
        both.filter(|shown| !shown.is_empty())
    }
}

impl Pipeline {
    /// The sources of the image prompts `used`, which are places in the request, by the same places.
    pub(super) fn image_sources(
        &self,
        (request, name): (&Resolved, &str),
        used: &BTreeSet<usize>,
        guided: bool,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<usize, ImageSources>> {
        let model = self.catalogue().model("model", name)?;
        let works = works(request, model, used, guided)?;
        let mut wanted = BTreeMap::<&str, BTreeSet<Sight>>::new();
        for work in &works {
            let Some(encoder) = &work.facts.image_encoder else {
                continue;
            };
            let form = work.facts.form;
            let sights = work.shown().flatten().filter_map(|shown| shown.sight(form));
            wanted.entry(encoder).or_default().extend(sights.cloned());
        }
        let mut seen = BTreeMap::new();
        for (encoder, sights) in wanted {
            let embeddings = self.look((request.memory(), name, encoder), sights, observer)?;
            seen.insert(encoder, embeddings);
        }
        let (mut sources, unseen) = (BTreeMap::new(), BTreeMap::new());
        for work in &works {
            let encoder = work.facts.image_encoder.as_deref();
            let seen = encoder.and_then(|encoder| seen.get(encoder));
            let known =
                self.adapter_kv((request, name), work, seen.unwrap_or(&unseen), observer)?;
            for (at, prompt, groups) in &work.prompts {
                let scales = prompt.scales(&model.unet.attentions)?;
                let mut made = ImageSources::default();
                for (group, scales) in groups.iter().zip(&scales) {
                    let source = |shown: &Vec<Shown>| {
                        let kv = known.get(shown)?;
                        let kv = scaled(kv, &model.unet.attentions, scales);
                        let area = group.areas.clone();
                        Some(Arc::new(AttentionSource { kv, area }))
                    };
                    made.positive.extend(source(&group.positive));
                    made.negative.extend(source(&group.negative));
                }
                sources.insert(*at, made);
            }
        }
        Ok(sources)
    }

    /// An adapter's keys and values of every group of pictures that its prompts name.
    fn adapter_kv<'a>(
        &self,
        (request, name): (&Resolved, &str),
        work: &'a Work<'_>,
        seen: &BTreeMap<Sight, ImageEmbedding>,
        observer: &mut Observer<'_>,
    ) -> Result<BTreeMap<&'a Vec<Shown>, KeysValues>> {
        let groups = work.shown().collect::<BTreeSet<_>>();
        let component = names::projection(work.adapter);
        let mut projection = self.network(name, &*component, &request.memory().into(), observer)?;
        self.begin_stage(observer, Stage::Image, &component)?;
        let reads = Projection {
            component: &component,
            facts: work.facts,
            seen,
            identities: &work.identities,
            shortcut: work.shortcut as f32,
        };
        let mut tokens = BTreeMap::<&Shown, Array2<f32>>::new();
        for shown in groups.iter().copied().flatten() {
            if !tokens.contains_key(shown) {
                tokens.insert(shown, reads.tokens(&mut projection.session, shown)?);
            }
        }
        self.give_back(projection);
        let joined = groups.iter().map(|shown| {
            let views = shown.iter().map(|shown| tokens[shown].view());
            concatenate(Axis(0), &views.collect::<Vec<_>>()).map_err(|e| Error::Contract {
                graph: component.clone(),
                tensor: names::IP_HIDDEN_STATES.into(),
                expected: "as wide for every picture".into(),
                actual: e.to_string(),
            })
        });
        let joined = joined.collect::<Result<Vec<_>>>()?;
        let component = names::adapter_kv(work.adapter);
        let joined = joined.into_iter();
        let of_adapter = (request, name, component.as_str());
        let kv = self.keys_values(of_adapter, Stage::Image, joined, observer)?;
        Ok(groups.into_iter().zip(kv).collect())
    }
}

/// The image prompts `used`, by adapter and shortcut. Masks and identities are read.
fn works<'a>(
    request: &'a Resolved,
    model: &'a Model,
    used: &BTreeSet<usize>,
    guided: bool,
) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::<Work<'a>>::new();
    let prompts = request.request.image_prompts.iter().flatten();
    for (at, prompt) in prompts.enumerate().filter(|(at, _)| used.contains(at)) {
        let adapter = prompt.adapter.as_str();
        let facts = model.adapter(adapter)?;
        let shortcut = prompt.shortcut.unwrap_or(1.0);
        let alike = |work: &Work<'_>| (work.adapter, work.shortcut) == (adapter, shortcut);
        let place = works.iter().position(alike).unwrap_or(works.len());
        if place == works.len() {
            works.push(Work {
                adapter,
                facts,
                shortcut,
                identities: Identities::new(),
                prompts: Vec::new(),
            });
        }
        let mut groups = groups(prompt, facts.form, guided);
        for group in &mut groups {
            let weights = group.mask.map(|mask| areas(request, model, mask));
            group.areas = weights.transpose()?;
        }
        works[place].prompts.push((at, prompt, groups));
    }
    for work in &mut works {
        work.identities = read_identities(work.shown().flatten(), work.facts)?;
    }
    Ok(works)
}

/// Pictures without masks are seen as one; with masks each is seen by itself.
fn groups(prompt: &ImagePrompt, form: AdapterForm, guided: bool) -> Vec<Group<'_>> {
    let (all, other) = (Shown::of(prompt, form), Shown::negative(prompt, form));
    let group = |shown: &[Shown], mask| Group {
        positive: shown.to_vec(),
        negative: vec![other.clone(); if guided { shown.len() } else { 0 }],
        mask,
        areas: None,
    };
    if prompt.masks.is_empty() {
        return vec![group(&all, None)];
    }
    let pairs = all.chunks(1).zip(&prompt.masks);
    pairs
        .map(|(shown, mask)| group(shown, Some(mask.as_path())))
        .collect()
}

/// What a mask weighs the places of the UNet's levels with.
fn areas(request: &Resolved, model: &Model, mask: &Path) -> Result<Areas> {
    let mask = area_mask(mask, (request.size.width, request.size.height))?;
    let scale = model.vae.scale;
    let (height, width) = (request.size.height / scale, request.size.width / scale);
    let grids = model.unet.grids(height, width).into_iter();
    Ok(grids
        .map(|(factor, grid)| (factor, area_at(&mask, grid)))
        .collect())
}

/// Keys as they are, values times the scale of their layer; `scales` has one entry for each of `attentions`.
fn scaled(kv: &KeysValues, attentions: &[Attention], scales: &[f64]) -> KeysValues {
    let of_width = |(width, kv): (&usize, &ndarray::Array4<f32>)| {
        let attentions = attentions
            .iter()
            .zip(scales)
            .filter(|(a, _)| a.width == *width);
        let of_layer = attentions.flat_map(|(a, scale)| std::iter::repeat_n(*scale, a.layers));
        let mut kv = kv.clone();
        for (layer, scale) in of_layer.enumerate() {
            kv.index_axis_mut(Axis(0), 2 * layer + 1)
                .mapv_inplace(|v| v * scale as f32);
        }
        (*width, kv)
    };
    kv.iter().map(of_width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_take_the_scale_of_their_layer_and_keys_none() {
        let attention = |name: &str, width, layers| Attention {
            name: name.into(),
            width,
            layers,
            factor: 2,
        };
        let attentions = [
            attention("a", 3, 2),
            attention("b", 5, 1),
            attention("c", 3, 1),
        ];
        let ones =
            |width: usize, layers: usize| ndarray::Array4::<f32>::ones((2 * layers, 1, 4, width));
        let kv = [(3, ones(3, 3)), (5, ones(5, 1))].into();
        let scaled = scaled(&kv, &attentions, &[0.5, -2.0, 0.0]);
        let of = |width: usize| {
            let kv = &scaled[&width];
            (0..kv.dim().0)
                .map(|side| kv[[side, 0, 0, 0]])
                .collect::<Vec<_>>()
        };
        assert_eq!(of(3), [1.0, 0.5, 1.0, 0.5, 1.0, 0.0]);
        assert_eq!(of(5), [1.0, -2.0]);
    }

    #[test]
    fn masked_pictures_are_seen_one_by_one() {
        let prompt: ImagePrompt = "a=x.png,y.png@mask=m.png,n.png".parse().unwrap();
        let masked = groups(&prompt, AdapterForm::Plus, true);
        assert_eq!(masked.len(), 2);
        assert!(
            masked
                .iter()
                .all(|g| g.positive.len() == 1 && g.negative.len() == 1)
        );
        let prompt: ImagePrompt = "a=x.png,y.png".parse().unwrap();
        let [joined] = &groups(&prompt, AdapterForm::Plus, true)[..] else {
            panic!("several groups");
        };
        assert_eq!((joined.positive.len(), joined.negative.len()), (2, 2));
        let unguided = groups(&prompt, AdapterForm::Plus, false);
        assert!(unguided[0].negative.is_empty());
    }
}
