//! Golden runs of diffusers' schedulers.

use std::cell::RefCell;
use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::Deserialize;

use super::runs::{from, network};
use tronie::noise::Noise;
use tronie::schedule::{SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Value};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

#[derive(Deserialize)]
struct Document {
    tolerances: Tolerances,
    configs: BTreeMap<String, BTreeMap<String, Value>>,
    fixed: BTreeMap<String, Value>,
    cases: Vec<Case>,
}

/// Seed of the noise that steps draw.
const NOISE_SEED: u64 = 7;

#[derive(Deserialize)]
struct Tolerances {
    plain: Tolerance,
    zero_snr: Tolerance,
    brownian: Tolerance,
    ancestral: Tolerance,
    single: Tolerance,
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
    asked: SamplingOptions,
    overrides: BTreeMap<String, Value>,
    begin: usize,
    shape: [usize; 4],
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
    fixed: BTreeMap<String, Value>,
    pub cases: Vec<Case>,
    kind: SchedulerKind,
    /// What was beyond its tolerance.
    wrong: RefCell<Vec<String>>,
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
            fixed,
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
            fixed,
            cases,
            kind,
            wrong: RefCell::default(),
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

    /// Everything that was beyond its tolerance, so far.
    pub fn wrong(&self) -> Vec<String> {
        self.wrong.borrow().clone()
    }

    /// Takes note of a number's distance from the reference's.
    fn compare(&self, kind: SchedulerKind, case: &Case, (off, allowed): (f64, f64), what: &str) {
        if off.is_nan() || off > allowed {
            let name = &case.name;
            let line = format!("{kind} {name}: {what} is off by {off:e}");
            self.wrong.borrow_mut().push(line);
        }
    }

    fn tolerance(&self, case: &Case) -> (&'static str, &Tolerance) {
        let zero_snr = case.overrides.get("rescale_betas_zero_snr") == Some(&Value::Flag(true));
        match self.kind {
            SchedulerKind::DpmppSde => ("brownian", &self.tolerances.brownian),
            SchedulerKind::Dpm2Ancestral => ("ancestral", &self.tolerances.ancestral),
            SchedulerKind::EdmDpmpp2m => ("single", &self.tolerances.single),
            _ if zero_snr => ("zero_snr", &self.tolerances.zero_snr),
            _ => ("plain", &self.tolerances.plain),
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
        let keys = self.configs[&case.config]
            .iter()
            .chain(&self.fixed)
            .chain(&case.overrides);
        keys.fold(SchedulerConfig::default(), |config, (key, value)| {
            config.with(key, value.clone())
        })
    }

    /// Plans and runs one case, and compares every number.
    pub fn check(&self, kind: SchedulerKind, case: &Case) {
        let config = self.settings(case);
        let schedule = kind
            .plan(&config, &case.asked)
            .unwrap_or_else(|e| panic!("{kind} {}: {e}", case.name));
        self.check_request_equals_configuration(kind, case, &schedule);
        let index = self
            .cases
            .iter()
            .position(|other| std::ptr::eq(other, case))
            .unwrap();
        let get = |name: &str| self.tensor(&format!("{index}/{name}"));

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
            let allowed = self.tolerance(case).1.sigma_relative;
            self.compare(kind, case, (off, allowed), &format!("sigma {theirs}"));
            self.note(case, off, |worst| &mut worst.sigma);
        }
        let calls = self.check_latents(kind, case, &schedule, &get("latents").unwrap());
        self.check_timesteps(kind, case, &calls, &get("calls").unwrap());
    }

    fn check_timesteps(&self, kind: SchedulerKind, case: &Case, calls: &[f64], theirs: &[f32]) {
        assert_eq!(calls.len(), theirs.len(), "{kind} {}", case.name);
        for (ours, theirs) in calls.iter().zip(theirs) {
            let off = (ours - f64::from(*theirs)).abs();
            let allowed = if theirs.fract() == 0.0 && ours.fract() == 0.0 {
                0.0
            } else {
                self.tolerance(case).1.timestep
            };
            self.compare(kind, case, (off, allowed), &format!("timestep {theirs}"));
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
        let mut asked = case.asked.clone();
        if let Some(spacing) = asked.spacing.take() {
            config = config.with("timestep_spacing", spacing.name());
        }
        // An Align Your Steps curve has no key; EDM's classes have a key of their own.
        if let Some(curve) = asked.sigmas.filter(|curve| *curve != SigmaCurve::Ays) {
            asked.sigmas = None;
            config = config.with("sigma_schedule", curve.name());
            for flag in [
                SigmaCurve::Karras,
                SigmaCurve::Exponential,
                SigmaCurve::Beta,
            ] {
                config = config.with(&format!("use_{flag}_sigmas"), flag == curve);
            }
        }
        let other = kind.plan(&config, &asked).unwrap();
        assert_eq!(
            (&other.timesteps, &other.sigmas),
            (&schedule.timesteps, &schedule.sigmas),
            "{kind} {}",
            case.name
        );
    }

    /// Compares the latents around every step; returns the timesteps of the network's calls.
    fn check_latents(
        &self,
        kind: SchedulerKind,
        case: &Case,
        schedule: &Schedule,
        expected: &[f32],
    ) -> Vec<f64> {
        let noise = from(1, case.shape);
        let mut x = if case.begin == 0 {
            noise.mapv(|x| x * schedule.init_noise_sigma as f32)
        } else {
            let clean = from(2, case.shape);
            schedule.add_noise(case.begin, clean, &noise).unwrap()
        };
        let rows: Vec<_> = expected.chunks(x.len()).collect();
        let steps = schedule.steps() - case.begin;
        assert_eq!(rows.len(), steps + 1, "{kind} {}", case.name);
        let mut scheduler = kind.start(schedule).unwrap();
        let mut noise = Noise::new(NOISE_SEED);
        let mut calls = Vec::new();
        for (row, index) in rows.iter().zip(case.begin..) {
            self.check_row(kind, case, index, (&x, row));
            if index < schedule.steps() {
                let at = Step {
                    schedule,
                    index,
                    prediction: schedule.prediction,
                    noise: &mut noise,
                };
                let mut denoise = |x: &Latents, t: f64| {
                    calls.push(t);
                    Ok(network(x, t))
                };
                x = scheduler.step(at, x, &mut denoise).unwrap();
            }
        }
        calls
    }

    fn check_row(
        &self,
        kind: SchedulerKind,
        case: &Case,
        index: usize,
        (ours, theirs): (&Latents, &[f32]),
    ) {
        let scale = theirs
            .iter()
            .fold(1.0_f32, |scale, value| scale.max(value.abs()));
        let off = ours
            .iter()
            .zip(theirs)
            .map(|(ours, theirs)| (ours - theirs).abs() / scale)
            .fold(
                0.0,
                |worst: f32, off| if off.is_nan() { off } else { worst.max(off) },
            );
        let allowed = self.tolerance(case).1.latents_of_scale;
        let what = format!("the latents before step {index}");
        self.compare(kind, case, (f64::from(off), allowed), &what);
        self.note(case, f64::from(off), |worst| &mut worst.latents);
    }
}
