//! Driving a scheduler the way the denoising loop does.

use std::ops::Range;

use tronie::Result;
use tronie::noise::Noise;
use tronie::schedule::{Schedule, SchedulerConfig};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

const SDXL: &str = r#"{"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1,
    "prediction_type": "epsilon", "clip_sample": false, "set_alpha_to_one": false, "interpolation_type": "linear",
    "use_karras_sigmas": false, "trained_betas": null, "skip_prk_steps": true}"#;

/// The scheduler configuration of SDXL base 1.0.
pub fn sdxl() -> SchedulerConfig {
    SchedulerConfig::from_json(SDXL).unwrap()
}

/// The network of `export/golden/schedulers.py`.
pub fn network(x: &Latents, timestep: f64) -> Latents {
    let weight = (0.5 + timestep / 2000.0) as f32;
    x.mapv(|x| x * weight / (1.0 + x.abs()))
}

/// Unit noise from a seed.
pub fn from(seed: u64, shape: [usize; 4]) -> Latents {
    Noise::new(seed).normal(shape)
}

/// A run on its way: what a handoff saves.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    pub latents: Latents,
    pub history: Vec<Latents>,
    pub noise: Noise,
}

/// A run before its first step.
pub fn initial(schedule: &Schedule, shape: [usize; 4]) -> Run {
    Run {
        latents: from(1, shape).mapv(|x| x * schedule.init_noise_sigma as f32),
        history: Vec::new(),
        noise: Noise::new(7),
    }
}

/// Runs some steps in a scheduler of their own.
pub fn drive(
    kind: SchedulerKind,
    schedule: &Schedule,
    run: Run,
    steps: Range<usize>,
) -> Result<Run> {
    let mut scheduler = kind.start(schedule)?;
    scheduler.restore(run.history)?;
    let (mut latents, mut noise) = (run.latents, run.noise);
    for index in steps {
        let at = Step {
            schedule,
            index,
            prediction: schedule.prediction,
            noise: &mut noise,
        };
        latents = scheduler.step(at, latents, &mut |x, t| Ok(network(x, t)))?;
    }
    Ok(Run {
        latents,
        history: scheduler.history(),
        noise,
    })
}
