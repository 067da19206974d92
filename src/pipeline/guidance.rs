//! Runs a UNet with or without a negative branch and combines the two.
//!
//! Classifier-free guidance, Ho & Salimans 2022; rescaling, Lin et al. 2023 (arXiv 2305.08891, equations 15–16); twin:
//! the denoising loop of diffusers' `StableDiffusionXLPipeline` and `rescale_noise_cfg`.

use ndarray::{Array1, Array4, ArrayView3, Axis, Ix4, Zip, concatenate, s};

use crate::error::{Error, Result};
use crate::plan::{Branch, Conditioning, Guidance, names};
use crate::request::GuidanceRuns;
use crate::runtime::{Binding, Feed, Session};
use crate::tensor::{Latents, Tensor, all_finite};

/// A UNet with everything it is told that does not change from step to step.
pub(super) struct Denoiser<'a> {
    session: &'a mut Session,
    guidance: Guidance,
    /// One entry a run of the UNet: both branches in one, or the negative before the positive. What they are told is
    /// bound, so it goes to the device once.
    runs: Vec<Binding>,
    /// Whether a run holds negative and positive halves.
    halves: bool,
}

impl<'a> Denoiser<'a> {
    /// Lays out the conditioning for latents `[batch, channels, h, w]`.
    pub(super) fn new(
        session: &'a mut Session,
        conditioning: &Conditioning,
        guidance: Guidance,
        latents: (usize, usize, usize, usize),
    ) -> Result<Self> {
        let (batch, channels, h, w) = latents;
        let Conditioning { positive, negative } = conditioning;
        let (rows, halves) = match (
            negative.as_ref().filter(|_| guidance.is_on()),
            guidance.runs,
        ) {
            (None, _) => (vec![vec![positive]], false),
            (Some(negative), GuidanceRuns::Split) => (vec![vec![negative], vec![positive]], false),
            (Some(negative), GuidanceRuns::Batch) => (vec![vec![negative, positive]], true),
        };
        let rows_of = |branches: &Vec<&Branch>| branches.len() * batch;
        let mut runs = Vec::with_capacity(rows.len());
        for branches in &rows {
            let fixed = lay_out(branches, batch)?;
            let fixed = fixed.iter().map(|(name, t)| (name.as_str(), t));
            let sample = Tensor::from(Array4::<f32>::zeros((rows_of(branches), channels, h, w)));
            let timestep = Tensor::from(Array1::<f32>::zeros(1));
            let varying = [(names::SAMPLE, &sample), (names::TIMESTEP, &timestep)];
            runs.push(session.bind(&fixed.collect::<Vec<_>>(), &varying)?);
        }
        Ok(Self {
            session,
            guidance,
            runs,
            halves,
        })
    }

    /// The guided output for model input `x` `[batch, channels, h, w]` at a timestep.
    pub(super) fn predict(&mut self, x: &Latents, timestep: f64) -> Result<Latents> {
        let timestep = Tensor::from(Array1::from_elem(1, timestep as f32));
        let sample = if self.halves { twice(x)? } else { x.clone() };
        let sample = Tensor::from(sample);
        let mut outputs = Vec::with_capacity(self.runs.len());
        let feeds: [Feed<'_>; 2] = [(names::SAMPLE, &sample), (names::TIMESTEP, &timestep)];
        for binding in &mut self.runs {
            let output = self
                .session
                .run_bound_for(binding, &feeds, names::OUT_SAMPLE)?
                .into_dimensionality::<Ix4>()
                .map_err(|e| misshapen(names::OUT_SAMPLE, &e))?;
            if !all_finite(&output) {
                return Err(Error::NonFinite {
                    component: names::UNET.into(),
                    step: None,
                    remedy: "lower the guidance, or check the checkpoint and its precision",
                });
            }
            outputs.push(output);
        }
        let batch = x.dim().0;
        let guided = match (outputs.pop(), outputs.pop()) {
            (Some(positive), Some(negative)) => combine(negative, &positive, self.guidance),
            (Some(both), None) if self.halves => {
                let positive = both.slice(s![batch.., .., .., ..]).to_owned();
                combine(
                    both.slice(s![..batch, .., .., ..]).to_owned(),
                    &positive,
                    self.guidance,
                )
            }
            (Some(only), None) => only,
            (None, _) => return Err(Error::Cancelled { step: 0 }),
        };
        Ok(guided)
    }
}

/// The UNet's constant inputs for `branches`, each repeated for every picture: all of the first branch, then all of the next.
fn lay_out(branches: &[&Branch], batch: usize) -> Result<Vec<(String, Tensor)>> {
    let rows = |pick: fn(&Branch) -> ndarray::ArrayView2<'_, f32>, name: &str| {
        let views = branches
            .iter()
            .flat_map(|b| std::iter::repeat_n(pick(b), batch))
            .collect::<Vec<_>>();
        concatenate(Axis(0), &views)
            .map(Tensor::from)
            .map_err(|e| misshapen(name, &e))
    };
    let mut inputs = vec![
        (
            names::TEXT_EMBEDS.to_owned(),
            rows(|b| b.text_embeds.view(), names::TEXT_EMBEDS)?,
        ),
        (
            names::TIME_IDS.to_owned(),
            rows(|b| b.time_ids.view(), names::TIME_IDS)?,
        ),
    ];
    let Some(first) = branches.first() else {
        return Ok(inputs);
    };
    for (place, source) in first.sources.iter().enumerate() {
        for width in source.kv.keys() {
            let name = source.kind.input(*width);
            let of_branches = branches
                .iter()
                .filter_map(|b| b.sources.get(place)?.kv.get(width));
            let views = of_branches.flat_map(|kv| std::iter::repeat_n(kv.view(), batch));
            let joined = concatenate(Axis(1), &views.collect::<Vec<_>>())
                .map_err(|e| misshapen(&name, &e))?;
            inputs.push((name, Tensor::from(joined)));
        }
    }
    Ok(inputs)
}

fn twice(x: &Latents) -> Result<Latents> {
    concatenate(Axis(0), &[x.view(), x.view()]).map_err(|e| misshapen(names::SAMPLE, &e))
}

/// `eps_u + scale * (eps_c - eps_u)`, then the rescaling if asked for.
fn combine(negative: Latents, positive: &Latents, guidance: Guidance) -> Latents {
    let scale = guidance.scale as f32;
    let mut guided = negative;
    Zip::from(&mut guided)
        .and(positive)
        .for_each(|u, &c| *u += scale * (c - *u));
    if guidance.rescale > 0.0 {
        for (mut guided, positive) in guided
            .axis_iter_mut(Axis(0))
            .zip(positive.axis_iter(Axis(0)))
        {
            let ratio = (deviation(&positive) / deviation(&guided.view())) as f32;
            let share = guidance.rescale as f32;
            guided.mapv_inplace(|x| share * (x * ratio) + (1.0 - share) * x);
        }
    }
    guided
}

/// Standard deviation (unbiased, as torch's) of one picture's values.
fn deviation(values: &ArrayView3<'_, f32>) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let squares = values
        .iter()
        .map(|v| (f64::from(*v) - mean).powi(2))
        .sum::<f64>();
    (squares / (n - 1.0)).sqrt()
}

fn misshapen(tensor: &str, error: &ndarray::ShapeError) -> Error {
    Error::Contract {
        graph: names::UNET.into(),
        tensor: tensor.to_owned(),
        expected: "the same shape in both branches of guidance, rank as exported".into(),
        actual: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;

    fn guidance(scale: f64, rescale: f64) -> Guidance {
        Guidance {
            scale,
            rescale,
            runs: GuidanceRuns::Batch,
        }
    }

    #[test]
    fn full_rescaling_gives_the_unguided_contrast() {
        let positive = Array4::from_shape_fn((2, 4, 3, 5), |(b, c, y, x)| {
            ((b + 7 * c + 3 * y + x) % 11) as f32
        });
        let negative = Array4::from_shape_fn((2, 4, 3, 5), |(b, c, y, x)| {
            ((3 * b + c + y + 5 * x) % 7) as f32
        });
        let guided = combine(negative, &positive, guidance(7.5, 1.0));
        for (g, p) in guided.axis_iter(Axis(0)).zip(positive.axis_iter(Axis(0))) {
            assert!((deviation(&g) - deviation(&p)).abs() < 1e-5);
        }
    }

    #[test]
    fn scale_one_is_the_positive_branch() {
        let positive = Array4::from_elem((1, 4, 2, 2), 3.0);
        let guided = combine(
            Array4::from_elem((1, 4, 2, 2), -1.0),
            &positive,
            guidance(1.0, 0.0),
        );
        assert_eq!(guided, positive);
    }
}
