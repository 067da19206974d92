//! Golden runs of diffusers' schedulers.

use std::cell::RefCell;
use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::Deserialize;

use super::runs::network;
use tronie::noise::Noise;
use tronie::schedule::{
    Convention, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Spacing, Value,
};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

#[derive(Deserialize)]
struct Document {
    tolerances: Tolerances,
    configs: BTreeMap<String, BTreeMap<String, Value>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Tolerances {
    plain: Tolerance,
    zero_snr: Tolerance,
}

#[derive(Deserialize)]
struct Tolerance {
    timestep: f64,
    sigma_relative: f64,
    latents_of_scale: f64,
}

/// One run's settings.
#[derive(Deserialize)]
pub struct Case {
    name: String,
    config: String,
    steps: usize,
    spacing: Option<Spacing>,
    sigmas: Option<SigmaCurve>,
    overrides: BTreeMap<String, Value>,
    begin: usize,
}

/// The largest deviations seen.
#[derive(Default)]
struct Worst {
    timestep: f64,
    sigma: f64,
    latents: f64,
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            timestep,
            sigma,
            latents,
        } = self;
        write!(
            f,
            "timesteps within {timestep:.1e}, sigmas {sigma:.1e} relative, latents {latents:.1e} of their scale"
        )
    }
}

/// All runs of one scheduler.
pub struct Golden {
    tensors: BTreeMap<String, Vec<f32>>,
    tolerances: Tolerances,
    configs: BTreeMap<String, BTreeMap<String, Value>>,
    pub cases: Vec<Case>,
    /// By tolerance.
    worst: RefCell<BTreeMap<&'static str, Worst>>,
}

impl Golden {
    pub fn load(kind: SchedulerKind) -> Self {
        let path = format!(
            "{}/tests/golden/scheduler-{kind}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let text = &header.metadata().as_ref().unwrap()["golden"];
        let Document {
            tolerances,
            configs,
            cases,
        } = serde_json::from_str(text).unwrap();
        let values = |view: TensorView<'_>| {
            let (chunks, _) = view.data().as_chunks::<4>();
            chunks
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect()
        };
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = stored
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, values(view)))
            .collect();
        Self {
            tensors,
            tolerances,
            configs,
            cases,
            worst: RefCell::default(),
        }
    }

    /// The largest deviations of everything checked so far.
    pub fn worst(&self) -> String {
        let worst = self.worst.borrow();
        let lines: Vec<_> = worst
            .iter()
            .map(|(name, worst)| format!("\n  {name}: {worst}"))
            .collect();
        lines.concat()
    }

    fn tolerance(&self, case: &Case) -> (&'static str, &Tolerance) {
        let zero_snr = case.overrides.get("rescale_betas_zero_snr") == Some(&Value::Flag(true));
        if zero_snr {
            ("zero_snr", &self.tolerances.zero_snr)
        } else {
            ("plain", &self.tolerances.plain)
        }
    }

    fn note(&self, case: &Case, off: f64, which: impl Fn(&mut Worst) -> &mut f64) {
        let mut all = self.worst.borrow_mut();
        let worst = which(all.entry(self.tolerance(case).0).or_default());
        *worst = worst.max(off);
    }

    fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        self.tensors.get(name).cloned()
    }

    fn settings(&self, case: &Case) -> SchedulerConfig {
        let keys = self.configs[&case.config].iter().chain(&case.overrides);
        keys.fold(SchedulerConfig::default(), |config, (key, value)| {
            config.with(key, value.clone())
        })
    }

    /// Plans and runs one case, and compares every number.
    pub fn check(&self, kind: SchedulerKind, case: &Case) {
        let config = self.settings(case);
        let asked = SamplingOptions {
            steps: case.steps,
            spacing: case.spacing,
            sigmas: case.sigmas,
        };
        let schedule = kind
            .plan(&config, &asked)
            .unwrap_or_else(|e| panic!("{kind} {}: {e}", case.name));
        self.check_request_equals_configuration(kind, case, &schedule);
        let index = self
            .cases
            .iter()
            .position(|other| std::ptr::eq(other, case))
            .unwrap();
        let get = |name: &str| self.tensor(&format!("{index}/{name}"));

        self.check_timesteps(kind, case, &schedule, &get("timesteps").unwrap());
        let first = get("init_noise_sigma").unwrap();
        let pairs = [(schedule.init_noise_sigma, first[0])];
        let sigmas = get("sigmas").unwrap_or_default();
        let pairs = schedule
            .sigmas
            .iter()
            .copied()
            .zip(sigmas.iter().copied())
            .chain(pairs);
        for (ours, theirs) in pairs {
            let theirs = f64::from(theirs);
            let off = if ours == theirs {
                0.0
            } else {
                (ours / theirs - 1.0).abs()
            };
            assert!(
                off <= self.tolerance(case).1.sigma_relative,
                "{kind} {}: sigma {ours} for {theirs}",
                case.name
            );
            self.note(case, off, |worst| &mut worst.sigma);
        }
        self.check_latents(kind, case, &schedule, &get("latents").unwrap());
    }

    fn check_timesteps(
        &self,
        kind: SchedulerKind,
        case: &Case,
        schedule: &Schedule,
        timesteps: &[f32],
    ) {
        assert_eq!(
            schedule.timesteps.len(),
            timesteps.len(),
            "{kind} {}",
            case.name
        );
        for (ours, theirs) in schedule.timesteps.iter().zip(timesteps) {
            let off = (ours - f64::from(*theirs)).abs();
            let allowed = if theirs.fract() == 0.0 && ours.fract() == 0.0 {
                0.0
            } else {
                self.tolerance(case).1.timestep
            };
            assert!(
                off <= allowed,
                "{kind} {}: timestep {ours} for {theirs}",
                case.name
            );
            self.note(case, off, |worst| &mut worst.timestep);
        }
    }

    /// What the request asks for and what the configuration says are one thing.
    fn check_request_equals_configuration(
        &self,
        kind: SchedulerKind,
        case: &Case,
        schedule: &Schedule,
    ) {
        let mut config = self.settings(case);
        if let Some(spacing) = case.spacing {
            config = config.with("timestep_spacing", spacing.name());
        }
        if let Some(sigmas) = case.sigmas {
            config = config.with("use_karras_sigmas", sigmas == SigmaCurve::Karras);
        }
        let asked = SamplingOptions {
            steps: case.steps,
            spacing: None,
            sigmas: None,
        };
        let other = kind.plan(&config, &asked).unwrap();
        assert_eq!(
            (&other.timesteps, &other.sigmas),
            (&schedule.timesteps, &schedule.sigmas),
            "{kind} {}",
            case.name
        );
    }

    fn check_latents(
        &self,
        kind: SchedulerKind,
        case: &Case,
        schedule: &Schedule,
        expected: &[f32],
    ) {
        let read =
            |name| Latents::from_shape_vec((1, 4, 1, 2), self.tensor(name).unwrap()).unwrap();
        let mut x = if case.begin == 0 {
            read("noise").mapv(|x| x * schedule.init_noise_sigma as f32)
        } else {
            schedule
                .add_noise(case.begin, read("clean"), &read("noise"))
                .unwrap()
        };
        let (rows, rest) = expected.as_chunks::<8>();
        assert!(
            rest.is_empty() && rows.len() == schedule.steps() - case.begin + 1,
            "{kind} {}",
            case.name
        );
        let mut scheduler = kind.start(schedule).unwrap();
        let mut noise = Noise::new(0);
        for (row, index) in rows.iter().zip(case.begin..) {
            let scale = row
                .iter()
                .fold(1.0_f32, |scale, value| scale.max(value.abs()));
            let off = x
                .iter()
                .zip(row)
                .map(|(ours, theirs)| (ours - theirs).abs() / scale)
                .fold(0.0, f32::max);
            let allowed = self.tolerance(case).1.latents_of_scale;
            assert!(
                f64::from(off) <= allowed,
                "{kind} {}: before step {index}: off by {off:e}",
                case.name
            );
            self.note(case, f64::from(off), |worst| &mut worst.latents);
            if index < schedule.steps() {
                let at = Step {
                    schedule,
                    index,
                    prediction: schedule.prediction,
                    noise: &mut noise,
                };
                x = scheduler
                    .step(at, x, &mut |x, t| Ok(network(x, t)))
                    .unwrap();
            }
        }
        let (fed, kept) = (schedule.convention, schedule.init_noise_sigma);
        assert!(
            fed == Convention::Exploding || kept == 1.0,
            "{kind}: a preserving latent starts at unit noise"
        );
    }
}
