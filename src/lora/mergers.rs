//! Files of mergers: this program's, and the merged updates of `ziplora-pytorch`.
//!
//! A merger is `unet.<module>.lora.merger_1 [inputs]` for the content's columns, `merger_2` for the style's, which are the
//! names of that program's own parameters. What it saves is their work, `unet.<module>.lora.weight [outputs, inputs]`, the
//! sum `W_1 diag(m_1) + W_2 diag(m_2)`; with both `LoRA`s at hand, the mergers follow from it column by column.
//!
//! Python twin: `Zip.load_mergers` of `export/zip_lora.py`; the other program is github.com/mkshing/ziplora-pytorch.

use std::collections::{BTreeMap, HashMap};

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::LowRank;
use super::zip::Mergers;
use super::zipped::{Pair, serialized};
use crate::error::{Error, Result, quoted};
use crate::model_file::ModelFile;
use crate::weights::Weights;

/// What a module's name may begin with, once or twice.
const UNET: &str = "unet.";
/// How far a merged update, saved in 16 bits, may be from one worked out here.
const ALIKE: f64 = 0.02;

/// What a tensor of such a file is.
enum Kind {
    Merger(usize),
    Merged,
}

impl Mergers {
    /// A file of mergers by module.
    ///
    /// # Errors
    /// [`Error::Request`] (`output`) if they are no tensors.
    pub fn file(all: &BTreeMap<String, Self>) -> Result<Vec<u8>> {
        let mut tensors = BTreeMap::new();
        for (module, mergers) in all {
            for (place, merger) in [&mergers.content, &mergers.style].into_iter().enumerate() {
                let row = merger.mapv(|m| m as f32).insert_axis(Axis(0));
                let name = format!("{UNET}{module}.lora.merger_{}", place + 1);
                tensors.insert(name, (vec![merger.len()], row));
            }
        }
        serialized(&tensors, HashMap::new())
    }

    /// Reads the mergers of a pair of `LoRA`s, by module.
    ///
    /// # Errors
    /// Those of [`Weights::open`]; [`Error::Weights`] if the file holds anything else, or not all of the pair's layers, was
    /// made of other `LoRA`s, or has numbers that are not finite.
    pub fn read(file: &ModelFile, pair: &Pair<'_>) -> Result<BTreeMap<String, Self>> {
        let weights = Weights::open(std::slice::from_ref(file))?;
        let fault = |reason: String| Error::Weights {
            path: file.path(),
            reason,
        };
        let widths = pair.layers().collect::<BTreeMap<_, _>>();
        let mut all = BTreeMap::<String, [Option<Array1<f64>>; 2]>::new();
        for name in weights.names() {
            let (module, kind) = kind(name).ok_or_else(|| {
                let reason = "is neither a merger nor a merged update of ziplora-pytorch";
                fault(format!("{} {reason}", quoted(name)))
            })?;
            let Some(&width) = widths.get(module) else {
                let reason = "is not a layer that both LoRAs change: name the two it was made of";
                return Err(fault(format!("{} {reason}", quoted(module))));
            };
            let entry = all.entry(module.to_owned()).or_default();
            match kind {
                Kind::Merger(place) => {
                    let values = weights.tensor_f32(name, &[width])?;
                    entry[place] = Some(values.as_slice().iter().map(|v| f64::from(*v)).collect());
                }
                Kind::Merged => {
                    let updates = pair.updates(module)?;
                    let shape = [updates[0].up.nrows(), width];
                    let merged = weights.tensor_f32(name, &shape)?;
                    let merged = ArrayView2::from_shape(shape, merged.as_slice());
                    let merged = merged.map_err(|e| fault(e.to_string()))?;
                    let other = "was not made of these two LoRAs";
                    let split = split(&updates, &merged);
                    let split = split.ok_or_else(|| fault(format!("{} {other}", quoted(name))))?;
                    *entry = split.map(Some);
                }
            }
        }
        let mut result = BTreeMap::new();
        for module in widths.keys() {
            let found = all.remove(*module).unwrap_or_default();
            let [Some(content), Some(style)] = found else {
                let reason = format!(
                    "has no two mergers of {}, a layer that both LoRAs change",
                    quoted(module)
                );
                return Err(fault(reason));
            };
            if content.iter().chain(&style).any(|m| !m.is_finite()) {
                return Err(fault(format!("{}: a merger is not finite", quoted(module))));
            }
            result.insert((*module).to_owned(), Self { content, style });
        }
        Ok(result)
    }
}

/// The module that a tensor belongs to, and what it is.
fn kind(name: &str) -> Option<(&str, Kind)> {
    let mut rest = name;
    while let Some(inner) = rest.strip_prefix(UNET) {
        rest = inner;
    }
    let (module, last) = rest.rsplit_once('.')?;
    let (module, holder) = module.rsplit_once('.')?;
    let kind = match (holder, last) {
        ("lora" | "lora_layer", "merger_1") => Kind::Merger(0),
        ("lora" | "lora_layer", "merger_2") => Kind::Merger(1),
        ("lora", "weight") => Kind::Merged,
        _ => return None,
    };
    Some((module, kind))
}

/// The mergers that make `merged` of the two updates; `None` if none do.
fn split(updates: &[LowRank; 2], merged: &ArrayView2<'_, f32>) -> Option<[Array1<f64>; 2]> {
    let full = |update: &LowRank| -> Array2<f64> { update.up.dot(&update.down).mapv(f64::from) };
    let (content, style) = (full(&updates[0]), full(&updates[1]));
    let merged = merged.mapv(f64::from);
    let (mut of_content, mut of_style) = (Vec::new(), Vec::new());
    let (mut apart, mut whole) = (0.0, 0.0);
    let columns = content.columns().into_iter().zip(style.columns());
    for ((c, s), m) in columns.zip(merged.columns()) {
        let [a, b] = two_by_two([c.dot(&c), c.dot(&s), s.dot(&s)], [c.dot(&m), s.dot(&m)]);
        let rest = |((c, s), m): ((&f64, &f64), &f64)| (a * c + b * s - m).powi(2);
        apart += c.iter().zip(&s).zip(&m).map(rest).sum::<f64>();
        whole += m.dot(&m);
        of_content.push(a);
        of_style.push(b);
    }
    let mergers = [of_content, of_style].map(Array1::from);
    (apart.sqrt() <= ALIKE * whole.sqrt()).then_some(mergers)
}

/// The least solution of `[[p, q], [q, r]] x = y`; columns that are parallel, or nothing, leave a line or a plane of them.
fn two_by_two([p, q, r]: [f64; 3], [y, z]: [f64; 2]) -> [f64; 2] {
    let (trace, determinant) = (p + r, p * r - q * q);
    if determinant > 1e-10 * trace * trace {
        return [(r * y - q * z) / determinant, (p * z - q * y) / determinant];
    }
    if trace > 0.0 {
        return [y / trace, z / trace];
    }
    [0.0, 0.0]
}
