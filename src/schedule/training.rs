//! The noise levels a network was trained on, one per training timestep.
//!
//! Python twin: the `betas` / `alphas_cumprod` block at the top of every diffusers scheduler's `__init__`.

use super::config::{SchedulerConfig, Value, unusable};
use crate::error::{Error, Result};

/// The largest number of training timesteps that is believed; real models have 1000.
const MAX_TRAIN_STEPS: usize = 100_000;

/// ᾱ of the last training timestep under zero terminal SNR, where a scheduler needs a finite σ: 2⁻²⁴, hence σ = 4096.
const ZERO_SNR_FLOOR: f32 = 1.0 / 16_777_216.0;

/// How β runs over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BetaCurve {
    /// Evenly from start to end.
    Linear,
    /// √β evenly from start to end: the Stable Diffusion family.
    ScaledLinear,
    /// The cosine schedule of improved DDPM.
    SquaredCosine,
}

/// What a scheduler class assumes where the configuration is silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainingDefaults {
    /// `beta_start`.
    pub start: f64,
    /// `beta_end`.
    pub end: f64,
    /// `beta_schedule`.
    pub curve: BetaCurve,
    /// What becomes of `rescale_betas_zero_snr`.
    pub zero_snr: ZeroSnr,
}

impl TrainingDefaults {
    /// What most of diffusers' classes assume.
    pub(crate) const fn common(zero_snr: ZeroSnr) -> Self {
        Self {
            start: 0.0001,
            end: 0.02,
            curve: BetaCurve::Linear,
            zero_snr,
        }
    }

    /// What classes assume that were written for Stable Diffusion, up to the curve.
    pub(crate) const fn stable_diffusion(curve: BetaCurve, zero_snr: ZeroSnr) -> Self {
        Self {
            start: 0.000_85,
            end: 0.012,
            curve,
            zero_snr,
        }
    }

    /// `beta_schedule`.
    fn curve(&self, config: &SchedulerConfig) -> Result<BetaCurve> {
        let curves = [
            ("linear", BetaCurve::Linear),
            ("scaled_linear", BetaCurve::ScaledLinear),
            ("squaredcos_cap_v2", BetaCurve::SquaredCosine),
        ];
        config.one_of("beta_schedule", &curves, self.curve)
    }

    /// β of every training timestep, each between 0 and 1.
    fn betas(&self, config: &SchedulerConfig, steps: usize) -> Result<Vec<f32>> {
        let start = config.number("beta_start")?.unwrap_or(self.start);
        let end = config.number("beta_end")?.unwrap_or(self.end);
        let betas = if let Some(betas) = config.numbers("trained_betas")? {
            let value = Value::Numbers(betas.to_vec());
            if betas.len() != steps {
                return Err(unusable(
                    "trained_betas",
                    &value,
                    &format!("num_train_timesteps = {steps} numbers, null"),
                ));
            }
            betas.iter().map(|&b| b as f32).collect()
        } else {
            match self.curve(config)? {
                BetaCurve::Linear => linspace_f32(start, end, steps),
                BetaCurve::ScaledLinear => linspace_f32(start.sqrt(), end.sqrt(), steps)
                    .into_iter()
                    .map(|x| x * x)
                    .collect(),
                BetaCurve::SquaredCosine => squared_cosine(steps),
            }
        };
        if let Some(beta) = betas.iter().find(|b| !(**b > 0.0 && **b < 1.0)) {
            let reason = format!(
                "beta_start {start}, beta_end {end} or trained_betas give a beta of {beta}"
            );
            return Err(Error::request(
                "scheduler",
                format!("{reason}; every beta must lie between 0 and 1"),
            ));
        }
        Ok(betas)
    }
}

/// What a scheduler class makes of `rescale_betas_zero_snr`, which leaves ᾱ = 0 at the last training timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ZeroSnr {
    /// Nothing: the class does not know the key.
    Unknown,
    /// Kept as it is: σ is infinite, and only v-prediction and sample prediction work there.
    Exact,
    /// Raised to 2⁻²⁴: σ = 4096.
    Floored,
}

/// The noise level of every training timestep t: ᾱ(t), the share of signal in the variance.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    alphas_cumprod: Vec<f32>,
    cosine: bool,
}

impl Training {
    /// Builds the table from a configuration, rounding where torch rounds (f32 betas, products accumulated in f64).
    ///
    /// # Errors
    /// [`Error::Request`] for a beta schedule, a range or a length that cannot be used.
    pub(crate) fn new(config: &SchedulerConfig, defaults: TrainingDefaults) -> Result<Self> {
        let steps = config.count("num_train_timesteps", 1000, 2..=MAX_TRAIN_STEPS)?;
        let mut betas = defaults.betas(config, steps)?;
        let zero_snr = defaults.zero_snr != ZeroSnr::Unknown
            && config.flag("rescale_betas_zero_snr", false)?;
        if zero_snr {
            betas = rescale_to_zero_snr(&betas);
        }
        let mut alphas_cumprod = cumulative_product(&betas);
        if zero_snr
            && defaults.zero_snr == ZeroSnr::Floored
            && let Some(last) = alphas_cumprod.last_mut()
        {
            *last = ZERO_SNR_FLOOR;
        }
        let signal = &alphas_cumprod[..steps - usize::from(zero_snr)];
        if signal.iter().any(|a| !(*a > 0.0 && *a < 1.0)) {
            let reason = "beta_start, beta_end or trained_betas leave no signal or no noise at some training timestep";
            return Err(Error::request(
                "scheduler",
                format!("{reason}; their products must stay between 0 and 1"),
            ));
        }
        Ok(Self {
            alphas_cumprod,
            cosine: defaults.curve(config)? == BetaCurve::SquaredCosine,
        })
    }

    /// The table of a network that was trained on levels given as σ, lowest first.
    pub(crate) fn of_sigmas(sigmas: impl IntoIterator<Item = f64>) -> Self {
        let signal = |sigma: f64| (1.0 / (1.0 + sigma * sigma)) as f32;
        Self {
            alphas_cumprod: sigmas.into_iter().map(signal).collect(),
            cosine: false,
        }
    }

    /// Number of training timesteps.
    pub fn steps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// ᾱ of a training timestep, `None` outside the table.
    pub fn alpha_cumprod(&self, timestep: usize) -> Option<f64> {
        self.alphas_cumprod.get(timestep).map(|&a| f64::from(a))
    }

    /// The highest and the lowest σ.
    pub(crate) fn range(&self) -> (f64, f64) {
        let highest = self.sigma(self.steps() - 1);
        (f64::from(highest), f64::from(self.sigma(0)))
    }

    /// A list of timesteps, if all of them are in the table.
    pub(crate) fn holding<'a>(&self, timesteps: &'a [f64]) -> Result<&'a [f64]> {
        let last = self.steps() - 1;
        match timesteps.iter().find(|t| **t > last as f64) {
            None => Ok(timesteps),
            Some(t) => {
                let reason = format!("{t} is beyond the last training timestep, {last}");
                Err(Error::request("timesteps-list", reason))
            }
        }
    }

    /// A list of whole timesteps, if all of them are in the table.
    pub(crate) fn holding_whole<'a>(&self, timesteps: &'a [f64]) -> Result<&'a [f64]> {
        if let Some(t) = timesteps.iter().find(|t| t.fract() != 0.0) {
            let reason = format!("{t} is not a whole timestep, and this scheduler takes no other");
            return Err(Error::request("timesteps-list", reason));
        }
        self.holding(timesteps)
    }

    /// Whether the table is the cosine one; diffusers rounds Karras timesteps differently there.
    pub(crate) fn is_cosine(&self) -> bool {
        self.cosine
    }

    /// σ = √((1 − ᾱ)/ᾱ) of a training timestep in f32; the last one beyond the table.
    pub(crate) fn sigma(&self, timestep: usize) -> f32 {
        let a = self.alphas_cumprod[timestep.min(self.steps() - 1)];
        ((1.0 - a) / a).sqrt()
    }

    /// σ at a timestep that may lie between two training timesteps (`numpy.interp`).
    pub(crate) fn sigma_at(&self, timestep: f64) -> f64 {
        let low = (timestep.max(0.0) as usize).min(self.steps() - 2);
        let (a, b) = (f64::from(self.sigma(low)), f64::from(self.sigma(low + 1)));
        (b - a) * (timestep - low as f64).clamp(0.0, 1.0) + a
    }

    /// The fractional timestep whose σ this is, found on a logarithmic scale (diffusers `_sigma_to_t`).
    pub(crate) fn timestep_of(&self, sigma: f64) -> f64 {
        let log_table = |t: usize| f64::from(self.sigma(t)).ln() as f32;
        let log_sigma = sigma.max(1e-10).ln();
        // σ never falls with t, so bisection finds the last entry that is not above: 0 ≤ low < high.
        let (mut low, mut high) = (0, self.steps() - 1);
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            if f64::from(log_table(middle)) <= log_sigma {
                low = middle;
            } else {
                high = middle;
            }
        }
        let (a, b) = (log_table(low), log_table(low + 1));
        let w = ((f64::from(a) - log_sigma) / f64::from(a - b)).clamp(0.0, 1.0);
        (1.0 - w) * low as f64 + w * (low + 1) as f64
    }
}

/// `torch.linspace` in f32: counted from both ends, one rounding each. At least two steps.
pub(crate) fn linspace_f32(start: f64, end: f64, steps: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (steps - 1) as f32;
    let value = |i: usize| {
        if i < steps / 2 {
            step.mul_add(i as f32, start)
        } else {
            (-step).mul_add((steps - 1 - i) as f32, end)
        }
    };
    (0..steps).map(value).collect()
}

/// diffusers `betas_for_alpha_bar`, cosine transform, β capped at 0.999.
fn squared_cosine(steps: usize) -> Vec<f32> {
    let alpha_bar = |t: f64| {
        ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0)
            .cos()
            .powi(2)
    };
    let n = steps as f64;
    (0..steps)
        .map(|i| (1.0 - alpha_bar((i + 1) as f64 / n) / alpha_bar(i as f64 / n)).min(0.999) as f32)
        .collect()
}

/// ᾱ from β: running product in f64, every prefix rounded to f32 (torch's CPU `cumprod`).
fn cumulative_product(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0_f64;
    let step = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(step).collect()
}

/// Shifts and scales √ᾱ so that it ends at 0 (Lin et al. 2023, algorithm 1; diffusers `rescale_zero_terminal_snr`).
fn rescale_to_zero_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_product(betas)
        .into_iter()
        .map(f32::sqrt)
        .collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let bar: Vec<f32> = roots
        .iter()
        .map(|root| ((root - last) * scale).powi(2))
        .collect();
    let alphas = std::iter::once(bar[0]).chain(bar.windows(2).map(|pair| pair[1] / pair[0]));
    alphas.map(|alpha| 1.0 - alpha).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: TrainingDefaults = TrainingDefaults {
        start: 0.000_85,
        end: 0.012,
        curve: BetaCurve::ScaledLinear,
        zero_snr: ZeroSnr::Floored,
    };

    #[test]
    fn the_sdxl_table_has_torchs_bits() {
        let table = Training::new(&SchedulerConfig::default(), DEFAULTS).unwrap();
        assert_eq!(table.alphas_cumprod[0].to_bits(), 0x3f7f_c84b);
        assert_eq!(table.alphas_cumprod[999].to_bits(), 0x3b98_b3b6);
        // torch takes the square root with a vector library that is one unit off now and then.
        assert!(table.sigma(0).to_bits().abs_diff(0x3cee_f0c1) <= 1);
        assert!(table.sigma(999).to_bits().abs_diff(0x4169_d598) <= 1);
    }

    #[test]
    fn sigma_and_timestep_are_inverse() {
        let table = Training::new(&SchedulerConfig::default(), DEFAULTS).unwrap();
        for t in [0.0, 1.0, 20.25, 500.0, 998.5, 999.0] {
            assert!(
                (table.timestep_of(table.sigma_at(t)) - t).abs() < 2e-2,
                "{t}"
            );
        }
    }

    #[test]
    fn zero_snr_ends_at_the_floor_or_at_nothing() {
        let config = SchedulerConfig::default().with("rescale_betas_zero_snr", true);
        let floored = Training::new(&config, DEFAULTS).unwrap();
        assert!((floored.sigma(999) - 4096.0).abs() < 1.0);
        let exact = Training::new(
            &config,
            TrainingDefaults {
                zero_snr: ZeroSnr::Exact,
                ..DEFAULTS
            },
        )
        .unwrap();
        assert_eq!(exact.alpha_cumprod(999), Some(0.0));
    }

    #[test]
    fn impossible_betas_are_named() {
        for (key, value) in [
            ("beta_end", 1.5),
            ("beta_start", -0.1),
            ("num_train_timesteps", 1.0),
        ] {
            let config = SchedulerConfig::default().with(key, value);
            let message = Training::new(&config, DEFAULTS).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        let config = SchedulerConfig::default().with("beta_schedule", "sigmoid");
        let message = Training::new(&config, DEFAULTS).unwrap_err().to_string();
        assert!(
            message.contains("sigmoid") && message.contains("squaredcos_cap_v2"),
            "{message}"
        );
    }
}
