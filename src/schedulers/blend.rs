//! Arithmetic on latents: f32 values, f64 coefficients, one rounding an element.

use std::borrow::Cow;

use super::Step;
use crate::error::Result;
use crate::schedule::Prediction;
use crate::tensor::Latents;

/// `x ← keep·x + Σ cᵢ·tᵢ`, in one pass. All shapes are equal.
pub(super) fn blend<const N: usize>(x: &mut Latents, keep: f64, terms: [(f64, &Latents); N]) {
    let terms = terms.map(|(share, term)| (share, flat(term)));
    let count = x.len();
    // As long as x for sure, so that the loop needs no checks and becomes vector instructions.
    let terms = terms
        .each_ref()
        .map(|(share, term)| (*share, &term[..count]));
    let blended = |i: usize, value: f32| {
        let mut sum = keep * f64::from(value);
        for (share, term) in &terms {
            sum += share * f64::from(term[i]);
        }
        sum as f32
    };
    match x.as_slice_mut() {
        Some(values) => {
            for (i, value) in values[..count].iter_mut().enumerate() {
                *value = blended(i, *value);
            }
        }
        None => {
            for (i, value) in x.iter_mut().enumerate() {
                *value = blended(i, *value);
            }
        }
    }
}

/// Values in logical order; copied only where a network returns them in another one.
fn flat(latents: &Latents) -> Cow<'_, [f32]> {
    match latents.as_slice() {
        Some(values) => Cow::Borrowed(values),
        None => Cow::Owned(latents.iter().copied().collect()),
    }
}

/// Turns a network's output for latents `x` at σ into the clean latents that it implies, each at most `clip` from 0.
pub(super) fn denoised(
    at: &Step<'_>,
    sigma: f64,
    x: &Latents,
    mut output: Latents,
    clip: f64,
) -> Result<Latents> {
    let (a, b) = at.schedule.denoised(sigma, at.prediction)?;
    if clip.is_infinite() {
        blend(&mut output, b, [(a, x)]);
    } else {
        output.zip_mut_with(x, |m, &x| {
            *m = (a * f64::from(x) + b * f64::from(*m)).clamp(-clip, clip) as f32;
        });
    }
    Ok(output)
}

/// `(c, d)` such that the noise is `c·x + d·output`, with variance-preserving x at (α, s).
pub(super) fn noise_of((alpha, s): (f64, f64), prediction: Prediction) -> (f64, f64) {
    match prediction {
        Prediction::Epsilon => (0.0, 1.0),
        Prediction::VPrediction => (s, alpha),
        Prediction::Sample => (1.0 / s, -alpha / s),
    }
}
