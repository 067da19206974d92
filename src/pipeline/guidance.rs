//! Runs a UNet with or without a negative branch and combines the two.
//!
//! Classifier-free guidance, Ho & Salimans 2022; rescaling, Lin et al. 2023 (arXiv 2305.08891, equations 15–16); twin:
//! the denoising loop of diffusers' `StableDiffusionXLPipeline` and `rescale_noise_cfg`.

use std::collections::BTreeMap;

use ndarray::{Array1, Array4, Ix4};

use super::sources;
use crate::error::{Error, Result};
use crate::plan::{Guidance, Plan, Segment, UnetForm, names};
use crate::request::GuidanceRuns;
use crate::runtime::{Binding, Feed, Session};
use crate::tensor::{Latents, Tensor, all_finite};

/// A UNet with everything that it is told over a run of segments.
pub(super) struct Denoiser<'a> {
    session: &'a mut Session,
    plan: &'a Plan,
    /// By positive and negative branch: segments may take turns.
    told: BTreeMap<Branches, Told>,
    now: Branches,
}

type Branches = (usize, Option<usize>);

/// What is bound for one pair of branches.
struct Told {
    /// One entry a run of the UNet: both branches in one, or the negative before the positive. What they are told is
    /// bound, so it goes to the device once.
    runs: Vec<Binding>,
    /// Whether a run holds negative and positive halves.
    halves: bool,
    /// Place for the input of a run, `[rows, channels, h, w]`.
    sample: Tensor,
}

impl<'a> Denoiser<'a> {
    pub(super) fn new(session: &'a mut Session, plan: &'a Plan) -> Self {
        Self {
            session,
            plan,
            told: BTreeMap::new(),
            now: (0, None),
        }
    }

    /// Tells the UNet what rules in the first of `segments`; what none of them needs is forgotten.
    pub(super) fn tell(&mut self, segments: &[Segment]) -> Result<()> {
        let branches = |segment: &Segment| (segment.positive, segment.negative);
        self.told
            .retain(|told, _| segments.iter().any(|segment| branches(segment) == *told));
        let Some(first) = segments.first() else {
            return Ok(());
        };
        self.now = branches(first);
        if !self.told.contains_key(&self.now) {
            let told = self.bind(self.now, &first.form)?;
            self.told.insert(self.now, told);
        }
        Ok(())
    }

    /// Lays out the branches for latents `[batch, channels, h, w]`.
    fn bind(&mut self, (positive, negative): Branches, form: &UnetForm) -> Result<Told> {
        let [batch, channels, h, w] = self.plan.latents;
        let branch = |at: usize| {
            self.plan
                .branches
                .get(at)
                .ok_or_else(|| misshapen(names::SAMPLE, &format!("no branch {at} in the plan")))
        };
        let positive = branch(positive)?;
        let negative = negative.map(branch).transpose()?;
        let (rows, halves) = match (negative, self.plan.guidance.runs) {
            (None, _) => (vec![vec![positive]], false),
            (Some(negative), GuidanceRuns::Split) => (vec![vec![negative], vec![positive]], false),
            (Some(negative), GuidanceRuns::Batch) => (vec![vec![negative, positive]], true),
        };
        let count = if halves { 2 * batch } else { batch };
        let sample = Tensor::from(Array4::<f32>::zeros((count, channels, h, w)));
        let timestep = Tensor::from(Array1::<f32>::zeros(1));
        let mut runs = Vec::with_capacity(rows.len());
        for branches in &rows {
            let fixed = sources::lay_out(branches, batch, form)?;
            let fixed = fixed.iter().map(|(name, t)| (name.as_str(), t));
            let varying = [(names::SAMPLE, &sample), (names::TIMESTEP, &timestep)];
            runs.push(self.session.bind(&fixed.collect::<Vec<_>>(), &varying)?);
        }
        Ok(Told {
            runs,
            halves,
            sample,
        })
    }

    /// The guided output of a step for model input `x` `[batch, channels, h, w]` at a timestep.
    pub(super) fn predict(&mut self, step: usize, x: &Latents, timestep: f64) -> Result<Latents> {
        let guidance = &self.plan.guidance;
        let scale = guidance.scales.get(step).copied().unwrap_or(1.0);
        let Some(told) = self.told.get_mut(&self.now) else {
            return Err(misshapen(names::SAMPLE, &"the UNet has been told nothing"));
        };
        fill(&mut told.sample, x);
        let timestep = Tensor::from(Array1::from_elem(1, timestep as f32));
        let feeds: [Feed<'_>; 2] = [(names::SAMPLE, &told.sample), (names::TIMESTEP, &timestep)];
        let mut outputs = [None, None];
        for (binding, slot) in told.runs.iter_mut().zip(&mut outputs) {
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
            *slot = Some(values(output));
        }
        let (mut guided, positive) = match outputs {
            [Some(mut both), None] if told.halves => {
                let (negative, positive) = both.split_at_mut(x.len());
                combine(negative, positive, scale, guidance, x.dim().0);
                both.truncate(x.len());
                (both, None)
            }
            [Some(negative), Some(positive)] => (negative, Some(positive)),
            [only, _] => (only.unwrap_or_default(), None),
        };
        if let Some(positive) = positive {
            combine(&mut guided, &positive, scale, guidance, x.dim().0);
        }
        Latents::from_shape_vec(x.raw_dim(), guided).map_err(|e| misshapen(names::OUT_SAMPLE, &e))
    }
}

/// The values of a network's output, row by row.
fn values(output: Latents) -> Vec<f32> {
    if output.is_standard_layout() {
        output.into_raw_vec_and_offset().0
    } else {
        output.iter().copied().collect()
    }
}

/// Puts `x` into every part of a run's input that has its size.
fn fill(sample: &mut Tensor, x: &Latents) {
    let Tensor::F32(sample) = sample else { return };
    let Some(places) = sample.as_slice_mut() else {
        return;
    };
    for places in places.chunks_exact_mut(x.len().max(1)) {
        match x.as_slice() {
            Some(values) => places.copy_from_slice(values),
            None => places.iter_mut().zip(x).for_each(|(to, v)| *to = *v),
        }
    }
}

/// `eps_u + scale * (eps_c - eps_u)`, in place of the negative output, then the rescaling if asked for. Both hold
/// `batch` pictures.
fn combine(guided: &mut [f32], positive: &[f32], scale: f64, guidance: &Guidance, batch: usize) {
    let scale = scale as f32;
    for (u, &c) in guided.iter_mut().zip(positive) {
        *u += scale * (c - *u);
    }
    if guidance.rescale > 0.0 {
        let picture = (positive.len() / batch.max(1)).max(1);
        let share = guidance.rescale as f32;
        for (guided, positive) in guided
            .chunks_exact_mut(picture)
            .zip(positive.chunks_exact(picture))
        {
            let ratio = (deviation(positive) / deviation(guided)) as f32;
            for x in guided {
                *x = share * (*x * ratio) + (1.0 - share) * *x;
            }
        }
    }
}

/// Standard deviation (unbiased, as torch's) of one picture's values.
fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let squares = values
        .iter()
        .map(|v| (f64::from(*v) - mean).powi(2))
        .sum::<f64>();
    (squares / (n - 1.0)).sqrt()
}

pub(super) fn misshapen(tensor: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Contract {
        graph: names::UNET.into(),
        tensor: tensor.to_owned(),
        expected: "the same shape in both branches of guidance, rank as exported".into(),
        actual: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guidance(rescale: f64) -> Guidance {
        Guidance {
            scales: Vec::new(),
            rescale,
            runs: GuidanceRuns::Batch,
        }
    }

    #[test]
    fn full_rescaling_gives_the_unguided_contrast() {
        let positive = (0..120).map(|i| (7 * i % 11) as f32).collect::<Vec<_>>();
        let mut guided = (0..120).map(|i| (3 * i % 7) as f32).collect::<Vec<_>>();
        combine(&mut guided, &positive, 7.5, &guidance(1.0), 2);
        for (g, p) in guided.chunks(60).zip(positive.chunks(60)) {
            assert!((deviation(g) - deviation(p)).abs() < 1e-5);
        }
    }

    #[test]
    fn scale_one_is_the_positive_branch() {
        let positive = [3.0; 16];
        let mut guided = [-1.0; 16];
        combine(&mut guided, &positive, 1.0, &guidance(0.0), 1);
        assert_eq!(guided.map(f32::to_bits), positive.map(f32::to_bits));
    }
}
