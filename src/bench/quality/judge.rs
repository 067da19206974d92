//! The judge: a network that says which attributes a picture has, and whose face it shows.

use std::path::Path;

use image::RgbImage;
use ndarray::{Array4, Axis, Ix2};

use super::questions::Choice;
use crate::error::{Error, Result};
use crate::graph::{Dim, Graph};
use crate::image::{Filter, resize};
use crate::memory::MemoryMode;
use crate::model_file::ModelFile;
use crate::runtime::{Runtime, Session};
use crate::tensor::{Tensor, TensorMap};
use crate::weights::Weights;

const GRAPH: &str = "judge.onnx.gz";
const WEIGHTS: &str = "judge.safetensors";
const COMPONENT: &str = "judge";
const PIXELS: &str = "pixel_values";
const LOGITS: &str = "logits";
const EMBEDDING: &str = "embedding";
/// Pictures that are looked at in one run.
const BATCH: usize = 16;

/// The network, ready to run.
pub(super) struct Judge {
    session: Session,
    /// Width and height of the pictures that it takes.
    size: (usize, usize),
    /// How many values each attribute has.
    choices: Vec<usize>,
}

/// What it says of one picture.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Verdict {
    /// The likeliest value of each attribute, and its probability.
    pub answers: Vec<(usize, f64)>,
    /// Whose face it is, of unit length.
    pub embedding: Vec<f32>,
}

impl Judge {
    /// Loads a folder's judge, whose logits are those of `choices`.
    pub fn open(runtime: &Runtime, folder: &Path, choices: &[Choice]) -> Result<Self> {
        let graph = Graph::load(folder.join(GRAPH).as_path())?;
        let weights = Weights::open(&[ModelFile::from(folder.join(WEIGHTS))])?;
        let port = graph.inputs.iter().find(|port| port.name == PIXELS);
        let size = match port.map(|port| port.dims.as_slice()) {
            Some([_, Dim::Fixed(3), Dim::Fixed(height), Dim::Fixed(width)]) => (*width, *height),
            _ => {
                return Err(Error::Graph {
                    path: folder.join(GRAPH),
                    reason: format!(
                        "has no input `{PIXELS}` [n, 3, height, width] of a fixed size"
                    ),
                });
            }
        };
        Ok(Self {
            session: runtime.session(COMPONENT, &graph, &weights, MemoryMode::Fast)?,
            size,
            choices: choices.iter().map(|choice| choice.values.len()).collect(),
        })
    }

    /// Looks at pictures of any size, which are fitted to its own.
    pub fn judge(&mut self, pictures: &[RgbImage]) -> Result<Vec<Verdict>> {
        let mut verdicts = Vec::new();
        for pictures in pictures.chunks(BATCH) {
            let pixels = Tensor::from(self.pixels(pictures));
            let mut outputs = self.session.run(&[(PIXELS, &pixels)])?;
            let logits = matrix(&mut outputs, LOGITS, pictures.len())?;
            let embeddings = matrix(&mut outputs, EMBEDDING, pictures.len())?;
            let width = self.choices.iter().sum::<usize>();
            if logits.ncols() != width {
                return Err(contract(
                    LOGITS,
                    format!("[{}, {width}], one for each of choices", pictures.len()),
                    format!("{:?}", logits.shape()),
                ));
            }
            let rows = logits.rows().into_iter().zip(embeddings.rows());
            verdicts.extend(rows.map(|(logits, embedding)| Verdict {
                answers: self.answers(&logits.to_vec()),
                embedding: unit(embedding.to_vec()),
            }));
        }
        Ok(verdicts)
    }

    /// Levels `0.0..=1.0`, `[n, 3, height, width]`.
    fn pixels(&self, pictures: &[RgbImage]) -> Array4<f32> {
        let (width, height) = self.size;
        let mut pixels = Array4::zeros((pictures.len(), 3, height, width));
        for (picture, mut to) in pictures.iter().zip(pixels.axis_iter_mut(Axis(0))) {
            let fitted = resize(picture, self.size, Filter::Bicubic);
            for (x, y, levels) in fitted.enumerate_pixels() {
                for (channel, level) in levels.0.into_iter().enumerate() {
                    to[[channel, y as usize, x as usize]] = f32::from(level) / 255.0;
                }
            }
        }
        pixels
    }

    fn answers(&self, logits: &[f32]) -> Vec<(usize, f64)> {
        let mut rest = logits;
        let answers = self.choices.iter().map(|&count| {
            let (own, others) = rest.split_at(count);
            rest = others;
            likeliest(own)
        });
        answers.collect()
    }
}

impl Verdict {
    /// The mean of several embeddings, of unit length.
    pub fn mean_embedding(verdicts: &[Self]) -> Vec<f32> {
        let width = verdicts.first().map_or(0, |v| v.embedding.len());
        let mut sum = vec![0.0; width];
        for verdict in verdicts {
            for (sum, value) in sum.iter_mut().zip(&verdict.embedding) {
                *sum += value;
            }
        }
        unit(sum)
    }
}

/// The place of the largest logit, and its softmax.
fn likeliest(logits: &[f32]) -> (usize, f64) {
    let pairs = logits.iter().copied().enumerate();
    let best = pairs.max_by(|a, b| a.1.total_cmp(&b.1));
    let (place, largest) = best.unwrap_or((0, 0.0));
    let total = logits.iter().map(|logit| f64::from(logit - largest).exp());
    (place, 1.0 / total.sum::<f64>())
}

fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    if length > 0.0 {
        for v in &mut vector {
            *v /= length;
        }
    }
    vector
}

fn matrix(outputs: &mut TensorMap, name: &str, rows: usize) -> Result<ndarray::Array2<f32>> {
    let expected = || format!("an f32 output [{rows}, width] of finite numbers");
    let array = match outputs.remove(name) {
        Some(Tensor::F32(array)) => array,
        Some(Tensor::I64(_)) => return Err(contract(name, expected(), "i64".into())),
        None => return Err(contract(name, expected(), "no such output".into())),
    };
    let shape = format!("{:?}", array.shape());
    let matrix = array
        .into_dimensionality::<Ix2>()
        .map_err(|_| contract(name, expected(), shape.clone()))?;
    if matrix.nrows() != rows || matrix.iter().any(|value| !value.is_finite()) {
        let found = format!("{shape}, or numbers that are not finite");
        return Err(contract(name, expected(), found));
    }
    Ok(matrix)
}

fn contract(tensor: &str, expected: String, actual: String) -> Error {
    Error::Contract {
        graph: COMPONENT.into(),
        tensor: tensor.into(),
        expected,
        actual,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_value_has_its_softmax() {
        let (place, probability) = likeliest(&[0.0, 2.0_f32.ln(), 0.0]);
        assert_eq!(place, 1);
        assert!((probability - 0.5).abs() < 1e-6);
        let (place, probability) = likeliest(&[900.0, -900.0]);
        assert_eq!(place, 0);
        assert!((probability - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_mean_embedding_has_unit_length() {
        let of = |embedding: [f32; 2]| Verdict {
            embedding: embedding.into(),
            ..Verdict::default()
        };
        let mean = Verdict::mean_embedding(&[of([1.0, 0.0]), of([0.0, 1.0])]);
        assert!(mean.iter().all(|v| (v - 0.5_f32.sqrt()).abs() < 1e-6));
    }
}
