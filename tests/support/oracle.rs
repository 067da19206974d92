//! A network that knows the picture.

use tronie::noise::Noise;
use tronie::schedule::{Convention, Prediction, Schedule};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

/// What a perfect network would say of `x`, as it is fed, given the clean latents and σ.
pub fn exact_output(
    schedule: &Schedule,
    prediction: Prediction,
    sigma: f64,
    x: &Latents,
    x0: &Latents,
) -> Latents {
    let mut out = x.clone();
    if let Convention::Preconditioned { data } = schedule.convention {
        let norm = (sigma * sigma + data * data).sqrt();
        let sign = if prediction == Prediction::VPrediction {
            -1.0
        } else {
            1.0
        };
        out.zip_mut_with(x0, |x, &x0| {
            // x was divided by the norm; x0 = c_skip·x + c_out·output.
            let x_full = f64::from(*x) * norm;
            let skip = data * data / (norm * norm);
            *x = ((f64::from(x0) - skip * x_full) / (sign * sigma * data / norm)) as f32;
        });
        return out;
    }
    // Both other conventions feed the network variance-preserving latents.
    let alpha = 1.0 / (1.0 + sigma * sigma).sqrt();
    let s = sigma * alpha;
    out.zip_mut_with(x0, |x, &x0| {
        let (v, x0) = (f64::from(*x), f64::from(x0));
        let noise = (v - alpha * x0) / s;
        *x = match prediction {
            Prediction::Epsilon => noise,
            Prediction::VPrediction => alpha * noise - s * x0,
            Prediction::Sample => x0,
        } as f32;
    });
    out
}

/// The level that a timestep between two steps stands for, on the logarithmic scale on which it was found.
fn level_of(schedule: &Schedule, timestep: f64) -> f64 {
    let low = (timestep as usize).min(schedule.training.steps() - 2);
    let log = |t: usize| {
        let a = schedule.training.alpha_cumprod(t).unwrap() as f32;
        f64::from(((1.0 - a) / a).sqrt()).ln()
    };
    let share = timestep - low as f64;
    ((1.0 - share) * log(low) + share * log(low + 1)).exp()
}

/// Runs a schedule from step `begin` on noised latents of `x0`, with the network that knows them.
pub fn painted(
    kind: SchedulerKind,
    schedule: &Schedule,
    begin: usize,
    x0: &Latents,
    noise: &Latents,
) -> Latents {
    let mut x = schedule.add_noise(begin, x0.clone(), noise).unwrap();
    let mut scheduler = kind.start(schedule).unwrap();
    let mut fresh = Noise::new(3);
    for index in begin..schedule.steps() {
        let mut first = true;
        let mut exact = |x: &Latents, timestep: f64| {
            let next = schedule.timesteps.get(index + 1);
            let sigma = if std::mem::take(&mut first) {
                schedule.sigmas[index]
            } else if next == Some(&timestep) {
                schedule.sigmas[index + 1]
            } else {
                level_of(schedule, timestep)
            };
            Ok(exact_output(schedule, schedule.prediction, sigma, x, x0))
        };
        let at = Step {
            schedule,
            index,
            prediction: schedule.prediction,
            noise: &mut fresh,
        };
        x = scheduler.step(at, x, &mut exact).unwrap();
    }
    x
}

/// The largest difference.
pub fn distance(a: &Latents, b: &Latents) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from((a - b).abs()))
        .fold(
            0.0,
            |worst: f64, off| if off.is_nan() { off } else { worst.max(off) },
        )
}
