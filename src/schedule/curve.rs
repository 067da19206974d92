//! Curves of noise levels that do not follow from a grid of timesteps.
//!
//! Python twin: `_convert_to_karras`, `_convert_to_exponential`, `_convert_to_beta` of diffusers' schedulers and its
//! `AysSchedules`.

use super::config::{SchedulerConfig, Value, unusable};
use super::grid::linspace;
use super::named;
use crate::error::Result;

named! {
    /// Which sigmas the steps take.
    SigmaCurve ("sigmas") {
        /// Those of the timesteps.
        Normal = "normal",
        /// Even in σ^(1/7) (Karras et al. 2022, equation 5).
        Karras = "karras",
        /// Even in ln σ.
        Exponential = "exponential",
        /// Dense at both ends: quantiles of a Beta(0.6, 0.6) distribution (Lee et al. 2024).
        Beta = "beta",
        /// The ten levels found for SDXL (Sabour et al. 2024, "Align Your Steps"); other step counts lie between them on
        /// a logarithmic scale, as its authors do it.
        Ays = "ays",
    }
}

named! {
    /// Which levels a Karras, exponential or beta curve joins.
    SigmaRange ("sigma-range") {
        /// The first and the last of the spacing's timesteps.
        Spacing = "spacing",
        /// The highest and the lowest that the network was trained on.
        Table = "table",
    }
}

/// ρ of Karras' curve.
const RHO: f64 = 7.0;

/// "Align Your Steps" for SDXL, ten steps.
const AYS: [f64; 10] = [
    14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113,
];

impl SigmaCurve {
    /// Levels from highest to lowest; `None` for the curve that follows the timesteps.
    pub(crate) fn levels(self, (highest, lowest): (f64, f64), steps: usize) -> Option<Vec<f64>> {
        match self {
            Self::Normal => None,
            Self::Karras => Some(karras(highest, lowest, steps, RHO)),
            Self::Exponential => Some(exponential(highest, lowest, steps)),
            Self::Beta => Some(
                linspace(0.0, 1.0, steps)
                    .into_iter()
                    .map(|ramp| lowest + beta_quantile(1.0 - ramp) * (highest - lowest))
                    .collect(),
            ),
            Self::Ays => Some(log_interpolated(&AYS, steps)),
        }
    }

    /// Whether the curve joins two levels that can be chosen.
    pub(crate) const fn has_range(self) -> bool {
        matches!(self, Self::Karras | Self::Exponential | Self::Beta)
    }
}

/// σ from highest to lowest, even in σ^(1/ρ).
pub(crate) fn karras(highest: f64, lowest: f64, steps: usize, rho: f64) -> Vec<f64> {
    let (high, low) = (highest.powf(1.0 / rho), lowest.powf(1.0 / rho));
    linspace(0.0, 1.0, steps)
        .into_iter()
        .map(|ramp| (high + ramp * (low - high)).powf(rho))
        .collect()
}

/// σ from highest to lowest, even in ln σ.
fn exponential(highest: f64, lowest: f64, steps: usize) -> Vec<f64> {
    linspace(highest.ln(), lowest.ln(), steps)
        .into_iter()
        .map(f64::exp)
        .collect()
}

/// The range of a curve: `sigma_max` and `sigma_min` of the configuration, else what it would be without them.
pub(crate) fn range(config: &SchedulerConfig, own: (f64, f64)) -> Result<(f64, f64)> {
    let highest = config.number("sigma_max")?.unwrap_or(own.0);
    let lowest = config.number("sigma_min")?.unwrap_or(own.1);
    if lowest > 0.0 && highest >= lowest {
        return Ok((highest, lowest));
    }
    Err(unusable(
        "sigma_min",
        &Value::Number(lowest),
        &format!("above 0, at most sigma_max ({highest})"),
    ))
}

/// A falling list stretched or thinned to another length, evenly in its index and logarithmic in its values.
fn log_interpolated(list: &[f64], steps: usize) -> Vec<f64> {
    let last = list.len() - 1;
    linspace(0.0, last as f64, steps)
        .into_iter()
        .map(|place| {
            let low = (place as usize).min(last - 1);
            let (a, b) = (list[low].ln(), list[low + 1].ln());
            ((b - a) * (place - low as f64) + a).exp()
        })
        .collect()
}

/// The value below which a share of the Beta(0.6, 0.6) distribution lies.
fn beta_quantile(share: f64) -> f64 {
    // The distribution is symmetric, and its lower half is where the series converges.
    if share > 0.5 {
        return 1.0 - beta_quantile(1.0 - share);
    }
    if share <= 0.0 {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, 0.5);
    // Newton's method from the leading term of the series, kept inside a bracket.
    let mut x = f64::powf(share * SHAPE * COMPLETE, 1.0 / SHAPE).min(high);
    for _ in 0..60 {
        let off = beta_share(x) - share;
        if off > 0.0 {
            high = x;
        } else {
            low = x;
        }
        let density = (x * (1.0 - x)).powf(SHAPE - 1.0) / COMPLETE;
        let next = x - off / density;
        let next = if next > low && next < high {
            next
        } else {
            f64::midpoint(low, high)
        };
        if (next - x).abs() <= 1e-16 * x {
            break;
        }
        x = next;
    }
    x
}

/// Both shape parameters of the distribution, as in diffusers.
const SHAPE: f64 = 0.6;
/// B(0.6, 0.6), the complete beta function.
const COMPLETE: f64 = 2.415_344_208_002_472_3;

/// The regularised incomplete beta function of both shapes 0.6, for x up to one half.
///
/// `x^a (1−x)^b / (a B) · Σ Π (a+b+k)/(a+1+k) · xᵏ` (DLMF 8.17.8).
fn beta_share(x: f64) -> f64 {
    let (mut term, mut sum) = (1.0, 1.0);
    for k in 0..200 {
        let k = f64::from(k);
        term *= (2.0 * SHAPE + k) / (SHAPE + 1.0 + k) * x;
        sum += term;
        if term < 1e-17 * sum {
            break;
        }
    }
    (x * (1.0 - x)).powf(SHAPE) / (SHAPE * COMPLETE) * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_quantiles_are_scipys() {
        // scipy.stats.beta.ppf(share, 0.6, 0.6)
        for (share, expected) in [
            (0.0, 0.0),
            (1e-4, 3.998_377_158_137_721e-7),
            (0.1, 0.039_584_405_588_780_85),
            (0.25, 0.175_680_378_652_694_98),
            (0.5, 0.5),
            (0.9, 1.0 - 0.039_584_405_588_780_85),
            (1.0, 1.0),
        ] {
            let off = (beta_quantile(share) - expected).abs();
            assert!(off < 1e-13, "{share}: off by {off:e}");
        }
    }

    #[test]
    fn ten_steps_of_ays_are_the_published_ones() {
        let levels = SigmaCurve::Ays.levels((1.0, 0.5), 10).unwrap();
        assert!(
            levels
                .iter()
                .zip(AYS)
                .all(|(a, b)| (a / b - 1.0).abs() < 1e-14)
        );
    }
}
