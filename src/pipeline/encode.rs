//! Texts become embeddings, embeddings become attention sources.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array2, Axis, Ix4};

use super::Pipeline;
use super::components::Part;
use crate::conditioning::{Encoded, Prompts, Reading, Told};
use crate::error::{Error, Result};
use crate::plan::{KeysValues, names};
use crate::progress::{Event, Observer, Stage};
use crate::request::Resolved;
use crate::runtime::Session;
use crate::tensor::Tensor;
use crate::text::{Embedding, embed};

/// What a branch is told, as a model's encoders read it.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// One entry an encoder; none for zeros.
    readings: Vec<Reading>,
    /// Whether it is the negative branch.
    negative: bool,
    /// Layers of the encoders that are left out.
    skip: usize,
}

impl Read {
    /// The longest reading's number of chunks; 0 for zeros, which are as long as they have to be.
    pub fn chunks(&self) -> usize {
        let chunks = self.readings.iter().map(|r| r.chunks.len());
        chunks.max().unwrap_or(0)
    }
}

impl Pipeline {
    /// Tokenizes what branches are told, and warns of words that do not fit.
    ///
    /// # Errors
    /// Those of loading tokenizers; [`Error::Request`] for texts that cannot be read.
    pub fn read(
        &self,
        request: &Resolved,
        name: &str,
        told: &[Told],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Read>> {
        let model = self.catalogue().model("model", name)?;
        let prompts = Prompts::new(&request.request, model)?;
        let fields = &request.request;
        let (skip, quirks) = (fields.clip_skip, fields.diffusers_quirks);
        let (skip, quirks) = (skip.unwrap_or(0), quirks.unwrap_or(false));
        let negative = |told: &Told| matches!(told, Told::Texts { negative: true, .. });
        let mut reads = told
            .iter()
            .map(|told| Read {
                readings: Vec::new(),
                negative: negative(told),
                // diffusers leaves layers out for the positive prompt only.
                skip: if quirks && negative(told) { 0 } else { skip },
            })
            .collect::<Vec<_>>();
        for (place, entry) in model.text.iter().enumerate() {
            let tokenizer = self.tokenizer(entry, observer)?;
            for (told, read) in told.iter().zip(&mut reads) {
                let reading = prompts.read(told, place, &tokenizer)?;
                if let Some(words) = reading.as_ref().and_then(|r| r.dropped.as_deref()) {
                    let (what, room) = (reading_of(read), entry.tokenizer.length);
                    let warning = format!(
                        "the {what} is longer than {}'s {room} tokens; dropped: {:?}",
                        entry.encoder,
                        words.trim()
                    );
                    self.notify(observer, Event::Warning(&warning), 0)?;
                }
                read.readings.extend(reading);
            }
        }
        Ok(reads)
    }

    /// Runs a model's text encoders over branches, each filled up to a number of chunks with chunks of the empty text.
    ///
    /// # Errors
    /// Those of loading and running text encoders; [`Error::Contract`] when they do not fit together.
    pub fn encode(
        &self,
        request: &Resolved,
        name: &str,
        branches: &[(&Read, usize)],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Encoded>> {
        let model = self.catalogue().model("model", name)?;
        let mut made = vec![Vec::new(); branches.len()];
        let skips = branches.iter().map(|(read, _)| read.skip);
        let skips = skips.collect::<BTreeSet<_>>();
        for place in 0..model.text.len() {
            for skip in &skips {
                let with_it = branches.iter().zip(&mut made);
                let with_it = with_it.filter(|((read, _), _)| read.skip == *skip);
                let jobs = with_it.map(|((read, chunks), made)| (*read, *chunks, made));
                self.run_encoder((request, name, place, *skip), jobs.collect(), observer)?;
            }
        }
        let length = model.text.first().map_or(0, |t| t.tokenizer.length);
        let branches = branches.iter().zip(made);
        let joined = branches.map(|((read, chunks), made)| {
            if read.readings.is_empty() {
                Ok(Encoded::zeros(model, chunks * length))
            } else {
                Encoded::join(model, &made)
            }
        });
        joined.collect()
    }

    /// Runs one of a model's encoders, some of its layers left out, over the branches that want it so.
    fn run_encoder(
        &self,
        (request, name, place, skip): (&Resolved, &str, usize, usize),
        jobs: Vec<(&Read, usize, &mut Vec<Vec<Embedding>>)>,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        if jobs.iter().all(|(read, ..)| read.readings.is_empty()) {
            return Ok(());
        }
        let model = self.catalogue().model("model", name)?;
        let component = model.text[place].encoder.as_str();
        let part = Part { component, skip };
        let loading = self.loading(request.memory(), &request.lora_set(), observer)?;
        let mut encoder = self.network(name, part, &loading, observer)?;
        self.begin_stage(observer, Stage::Text, component)?;
        // Chunks that return, such as the empty one, are encoded once.
        let mut known = BTreeMap::<&[i64], Embedding>::new();
        for (read, chunks, made) in jobs {
            let Some(reading) = read.readings.get(place) else {
                continue;
            };
            let mut embeddings = Vec::new();
            for chunk in reading.filled(chunks) {
                if !known.contains_key(&chunk.ids[..]) {
                    let new = embed(&mut encoder.session, component, &chunk.ids)?;
                    known.insert(&chunk.ids, new);
                }
                let mut embedding = known[&chunk.ids[..]].clone();
                chunk.weigh(reading.field, &mut embedding.hidden)?;
                embeddings.push(embedding);
            }
            made.push(embeddings);
        }
        self.give_back(encoder);
        Ok(())
    }

    /// Projects embeddings `[tokens, context]` to keys and values, with the component that holds a model's or an
    /// adapter's projections.
    pub(super) fn keys_values(
        &self,
        (request, name, component): (&Resolved, &str, &str),
        stage: Stage,
        hidden: impl Iterator<Item = Array2<f32>>,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<KeysValues>> {
        let model = self.catalogue().model("model", name)?;
        let loading = self.loading(request.memory(), &request.lora_set(), observer)?;
        let mut kv = self.network(name, component, &loading, observer)?;
        self.begin_stage(observer, stage, component)?;
        let layers = &model.unet.kv;
        let made = hidden
            .map(|hidden| project(&mut kv.session, component, layers, hidden))
            .collect::<Result<_>>()?;
        self.give_back(kv);
        Ok(made)
    }
}

/// Keys and values of embeddings `[tokens, context]` for `layers`, which are counted by width.
fn project(
    session: &mut Session,
    component: &str,
    layers: &BTreeMap<usize, usize>,
    hidden: Array2<f32>,
) -> Result<KeysValues> {
    let hidden = Tensor::from(hidden.insert_axis(Axis(0)));
    let mut outputs = session.run(&[(names::ENCODER_HIDDEN_STATES, &hidden)])?;
    let mut packed = KeysValues::new();
    for (width, layers) in layers {
        let tensor = names::text_kv(*width);
        let fail = |actual: String| Error::Contract {
            graph: component.to_owned(),
            tensor: tensor.clone(),
            expected: format!("[{}, 1, tokens, {width}]", 2 * layers),
            actual,
        };
        let Some(Tensor::F32(array)) = outputs.remove(&tensor) else {
            return Err(fail("no such output".into()));
        };
        let array = array
            .into_dimensionality::<Ix4>()
            .map_err(|e| fail(e.to_string()))?;
        let (rows, branches, _, found) = array.dim();
        if (rows, branches, found) != (2 * layers, 1, *width) {
            return Err(fail(format!("{:?}", array.shape())));
        }
        if !crate::tensor::all_finite(&array) {
            return Err(Error::NonFinite {
                component: component.to_owned(),
                step: None,
                remedy: "check its weights",
            });
        }
        packed.insert(*width, array);
    }
    Ok(packed)
}

/// The branch's name, for people.
fn reading_of(read: &Read) -> &'static str {
    if read.negative {
        "negative prompt"
    } else {
        "prompt"
    }
}
