//! What holds for schedulers whatever the settings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support {
    pub mod runs;
}

use proptest::prelude::*;
use support::runs::{drive, from, initial, sdxl};
use tronie::noise::Noise;
use tronie::schedule::{
    Convention, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Spacing,
};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

fn plan(kind: SchedulerKind, steps: usize) -> Schedule {
    kind.plan(
        &sdxl(),
        &SamplingOptions {
            steps,
            spacing: None,
            sigmas: None,
        },
    )
    .unwrap()
}

#[test]
fn a_segment_may_predict_something_else() {
    // The same exact answer in two parametrisations takes the same path.
    let schedule = plan(SchedulerKind::Dpmpp2m, 10);
    let x0 = from(3, [1, 4, 3, 3]);
    let path = |prediction| {
        let mut x = initial(&schedule, [1, 4, 3, 3]);
        let mut scheduler = SchedulerKind::Dpmpp2m.start(&schedule).unwrap();
        for index in 0..10 {
            let sigma = schedule.sigmas[index];
            let mut exact = |x: &Latents, _: f64| Ok(exact_output(sigma, prediction, x, &x0));
            let at = Step {
                schedule: &schedule,
                index,
                prediction,
                noise: &mut Noise::new(0),
            };
            x = scheduler.step(at, x, &mut exact).unwrap();
        }
        x
    };
    for prediction in Prediction::ALL {
        assert!(distance(&path(*prediction), &x0) < 1e-5, "{prediction}");
    }
}

/// What a perfect network would say of `x`, as it is fed, given the clean latents.
fn exact_output(sigma: f64, prediction: Prediction, x: &Latents, x0: &Latents) -> Latents {
    // Both conventions feed the network variance-preserving latents.
    let alpha = 1.0 / (1.0 + sigma * sigma).sqrt();
    let s = sigma * alpha;
    let mut out = x.clone();
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

fn distance(a: &Latents, b: &Latents) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from((a - b).abs()))
        .fold(0.0, f64::max)
}

/// Schedulers whose steps arrive at exactly the level that the next one starts from, whatever the spacing. DDIM aims a
/// fixed stride below each timestep; it has a test of its own.
const CONSISTENT: [SchedulerKind; 2] = [SchedulerKind::Euler, SchedulerKind::Dpmpp2m];

prop_compose! {
    fn settings(kinds: &'static [SchedulerKind])(
        kind in prop::sample::select(kinds),
        steps in prop_oneof![1_usize..=40, prop::sample::select(vec![61, 100, 250, 500, 997])],
        spacing in prop::sample::select(Spacing::ALL),
        karras in any::<bool>(),
        prediction in prop::sample::select(vec!["epsilon", "v_prediction", "sample"]),
        order in 1..=3_u8,
        heun in any::<bool>(),
        sigma_min in any::<bool>(),
        zero_snr in any::<bool>(),
        curve in prop::sample::select(vec!["linear", "scaled_linear", "squaredcos_cap_v2"]),
    ) -> (SchedulerKind, SchedulerConfig, SamplingOptions) {
        let config = sdxl()
            .with("prediction_type", prediction)
            .with("solver_order", f64::from(order))
            .with("solver_type", if heun { "heun" } else { "midpoint" })
            .with("final_sigmas_type", if sigma_min { "sigma_min" } else { "zero" })
            .with("rescale_betas_zero_snr", zero_snr && prediction != "epsilon")
            .with("beta_schedule", curve);
        let sigmas = (karras && kind.curves().contains(&SigmaCurve::Karras)).then_some(SigmaCurve::Karras);
        (kind, config, SamplingOptions { steps, spacing: Some(spacing), sigmas })
    }
}

proptest! {
    #[test]
    fn valid_settings_give_a_falling_schedule_and_finite_latents((kind, config, asked) in settings(SchedulerKind::ALL)) {
        let schedule = kind.plan(&config, &asked).unwrap();
        prop_assert_eq!(schedule.steps(), asked.steps);
        prop_assert_eq!(schedule.sigmas.len(), asked.steps + 1);
        prop_assert!(schedule.sigmas[..asked.steps].windows(2).all(|pair| pair[0] > pair[1]));
        prop_assert!(schedule.sigmas[asked.steps] <= schedule.sigmas[asked.steps - 1]);
        prop_assert!(schedule.timesteps.windows(2).all(|pair| pair[0] >= pair[1]));
        prop_assert!(schedule.timesteps.iter().all(|t| (0.0..=999.0).contains(t)));
        let handoff = schedule.handoff(0.8);
        prop_assert_eq!(schedule.steps() - handoff, schedule.timesteps.iter().filter(|t| **t < 200.0).count());
        let start = initial(&schedule, [1, 4, 2, 2]);
        let (x, _) = drive(kind, &schedule, start, 0..asked.steps, Vec::new()).unwrap();
        prop_assert!(x.iter().all(|value| value.is_finite()));
    }

    #[test]
    fn a_perfect_network_leads_to_its_clean_latents((kind, config, asked) in settings(&CONSISTENT), part in 0.0..1.0_f64) {
        let config = config.with("rescale_betas_zero_snr", false);
        let schedule = kind.plan(&config, &asked).unwrap();
        let begin = (part * asked.steps as f64) as usize;
        let x0 = from(5, [1, 4, 2, 2]);
        let noise = from(6, [1, 4, 2, 2]);
        let mut x = schedule.add_noise(begin, x0.clone(), &noise).unwrap();
        let mut scheduler = kind.start(&schedule).unwrap();
        for index in begin..asked.steps {
            let sigma = schedule.sigmas[index];
            let mut exact = |x: &Latents, _: f64| Ok(exact_output(sigma, schedule.prediction, x, &x0));
            let at = Step { schedule: &schedule, index, prediction: schedule.prediction, noise: &mut Noise::new(0) };
            x = scheduler.step(at, x, &mut exact).unwrap();
        }
        // Where the schedule ends above zero, exactly that much noise stays.
        let end = schedule.sigmas[asked.steps];
        let allowed = 1e-4 * (1.0 + schedule.sigmas[begin] / 50.0);
        let mut rest = x0.clone();
        let (a, s) = match schedule.convention {
            Convention::Exploding => (1.0, end),
            Convention::Preserving => (1.0 / (1.0 + end * end).sqrt(), end / (1.0 + end * end).sqrt()),
        };
        rest.zip_mut_with(&noise, |x, &n| *x = (a * f64::from(*x) + s * f64::from(n)) as f32);
        prop_assert!(distance(&x, &rest) <= allowed, "{} {}: off by {}", kind, schedule.steps(), distance(&x, &rest));
    }
}

#[test]
fn ddim_with_leading_spacing_is_consistent() {
    for steps in [1, 3, 7, 12, 30, 50] {
        let schedule = plan(SchedulerKind::Ddim, steps);
        let (x0, noise) = (from(5, [1, 4, 2, 2]), from(6, [1, 4, 2, 2]));
        let mut x = schedule.add_noise(0, x0.clone(), &noise).unwrap();
        let mut scheduler = SchedulerKind::Ddim.start(&schedule).unwrap();
        for index in 0..steps {
            let sigma = schedule.sigmas[index];
            let mut exact =
                |x: &Latents, _: f64| Ok(exact_output(sigma, Prediction::Epsilon, x, &x0));
            let at = Step {
                schedule: &schedule,
                index,
                prediction: Prediction::Epsilon,
                noise: &mut Noise::new(0),
            };
            x = scheduler.step(at, x, &mut exact).unwrap();
        }
        // The last step ends at the first training timestep, whose noise stays.
        let left = distance(&x, &x0);
        assert!(left > 0.0 && left < 0.11, "{steps}: {left}");
    }
}
