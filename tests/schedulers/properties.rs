//! What holds for schedulers whatever the settings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::oracle::{distance, exact_output, painted};
use crate::runs::{drive, from, initial, sdxl};
use proptest::prelude::*;
use tronie::noise::Noise;
use tronie::schedule::{
    Convention, FinalSigma, Knob, Prediction, SamplingOptions, Schedule, SchedulerConfig,
    SigmaCurve, SigmaRange, Spacing,
};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;

#[test]
fn a_segment_may_predict_something_else() {
    // The same exact answer in two parametrisations takes the same path.
    let kind = SchedulerKind::Dpmpp2m;
    let schedule = kind.plan(&sdxl(), &SamplingOptions::steps(10)).unwrap();
    let x0 = from(3, [1, 4, 3, 3]);
    let path = |prediction| {
        let mut x = initial(&schedule, [1, 4, 3, 3]).latents;
        let mut scheduler = kind.start(&schedule).unwrap();
        for index in 0..10 {
            let sigma = schedule.sigmas[index];
            let mut exact =
                |x: &Latents, _: f64| Ok(exact_output(&schedule, prediction, sigma, x, &x0));
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

/// A scheduler, what its model says, what the request says.
type Settings = (SchedulerKind, SchedulerConfig, SamplingOptions);

fn predictions(kind: SchedulerKind) -> &'static [&'static str] {
    match kind {
        SchedulerKind::Pndm | SchedulerKind::EdmEuler | SchedulerKind::EdmDpmpp2m => {
            &["epsilon", "v_prediction"]
        }
        _ => &["epsilon", "v_prediction", "sample"],
    }
}

prop_compose! {
    /// Raw choices; [`settle`] keeps those that the scheduler has.
    fn choices()(
        steps in prop_oneof![1_usize..=40, prop::sample::select(vec![61, 100, 250, 500, 997])],
        spacing in prop::sample::select(Spacing::ALL),
        curve in prop::sample::select(SigmaCurve::ALL),
        range in prop::option::of(prop::sample::select(SigmaRange::ALL)),
        final_sigma in prop::option::of(prop::sample::select(FinalSigma::ALL)),
        lower in any::<Option<bool>>(),
        order in prop::option::of(1_usize..=3),
        eta in prop::option::of(0.0..=1.0_f64),
        zero_snr in any::<bool>(),
        quirks in any::<bool>(),
    ) -> SamplingOptions {
        SamplingOptions {
            steps,
            spacing: Some(spacing),
            sigmas: Some(curve),
            sigma_range: range.filter(|_| !matches!(curve, SigmaCurve::Normal | SigmaCurve::Ays)),
            final_sigma,
            lower_order_final: lower,
            solver_order: order,
            eta,
            zero_snr: Some(zero_snr),
            diffusers_quirks: quirks,
            ..SamplingOptions::default()
        }
    }
}

prop_compose! {
    fn settings()(
        kind in prop::sample::select(SchedulerKind::ALL),
        asked in choices(),
        prediction in 0_usize..3,
        solver in prop::sample::select(vec!["midpoint", "heun", "bh1", "bh2", "logrho"]),
        sde in any::<bool>(),
        runge_kutta in any::<bool>(),
        curve in prop::sample::select(vec!["linear", "scaled_linear", "squaredcos_cap_v2"]),
    ) -> Settings {
        let known = predictions(kind);
        let config = sdxl()
            .with("prediction_type", known[prediction % known.len()])
            .with("solver_type", solver)
            .with("skip_prk_steps", !runge_kutta)
            .with("original_inference_steps", 1000.0)
            .with("beta_schedule", curve);
        let flexible = [SchedulerKind::DpmppSinglestep, SchedulerKind::EdmDpmpp2m];
        let config = if sde && flexible.contains(&kind) {
            config.with("algorithm_type", "sde-dpmsolver++")
        } else {
            config
        };
        settle(kind, config, asked)
    }
}

/// The choices that a scheduler has.
fn settle(kind: SchedulerKind, config: SchedulerConfig, asked: SamplingOptions) -> Settings {
    let has = |knob| kind.knobs().contains(&knob);
    let epsilon = config.prediction().unwrap() == Prediction::Epsilon;
    let sigmas = asked
        .sigmas
        .filter(|curve| has(Knob::Sigmas) && kind.curves().contains(curve));
    let asked = SamplingOptions {
        spacing: asked.spacing.filter(|_| has(Knob::Spacing)),
        sigmas,
        sigma_range: asked
            .sigma_range
            .filter(|_| has(Knob::SigmaRange) && sigmas.is_some()),
        final_sigma: asked.final_sigma.filter(|_| has(Knob::FinalSigma)),
        lower_order_final: asked
            .lower_order_final
            .filter(|_| has(Knob::LowerOrderFinal)),
        solver_order: asked.solver_order.filter(|_| has(Knob::Order)),
        eta: asked.eta.filter(|_| has(Knob::Eta)),
        zero_snr: asked
            .zero_snr
            .filter(|on| has(Knob::ZeroSnr) && !(*on && epsilon)),
        ..asked
    };
    (kind, config, asked)
}

proptest! {
    #[test]
    fn valid_settings_give_a_falling_schedule_and_finite_latents((kind, config, asked) in settings()) {
        let schedule = kind.plan(&config, &asked).unwrap();
        prop_assert_eq!(schedule.steps(), asked.steps);
        prop_assert_eq!(schedule.sigmas.len(), asked.steps + 1);
        prop_assert!(schedule.sigmas[..asked.steps].windows(2).all(|pair| pair[0] > pair[1]));
        prop_assert!(schedule.sigmas[asked.steps] <= schedule.sigmas[asked.steps - 1]);
        prop_assert!(schedule.timesteps.windows(2).all(|pair| pair[0] >= pair[1]));
        if !matches!(schedule.convention, Convention::Preconditioned { .. }) {
            prop_assert!(schedule.timesteps.iter().all(|t| (0.0..=999.0).contains(t)));
        }
        let handoff = schedule.handoff(0.8);
        prop_assert_eq!(schedule.steps() - handoff, schedule.timesteps.iter().filter(|t| **t < 200.0).count());
        let start = initial(&schedule, [1, 4, 2, 2]);
        let run = drive(kind, &schedule, start, 0..asked.steps).unwrap();
        prop_assert!(run.latents.iter().all(|value| value.is_finite()), "{kind}");
    }

    #[test]
    fn a_perfect_network_leads_to_its_clean_latents((kind, config, asked) in settings(), part in 0.0..1.0_f64) {
        let asked = SamplingOptions { zero_snr: None, diffusers_quirks: false, ..asked };
        let schedule = kind.plan(&config, &asked).unwrap();
        let begin = (part * asked.steps as f64) as usize;
        // Its first step takes the mean of ε here and at the next level, which a level almost without signal multiplies.
        prop_assume!(kind != SchedulerKind::Pndm || schedule.sigmas[begin] < 1000.0);
        let (x0, noise) = (from(5, [1, 4, 2, 2]), from(6, [1, 4, 2, 2]));
        let x = painted(kind, &schedule, begin, &x0, &noise);
        let roundings = 1.0 + asked.steps as f64 / 100.0;
        let allowed = 1e-4 * roundings * (1.0 + schedule.sigmas[begin] / 50.0) + slack(kind, asked.steps);
        let off = distance(&x, &x0);
        let end = schedule.sigmas[asked.steps];
        if end == 0.0 {
            prop_assert!(off <= allowed, "{} {}: off by {}", kind, schedule.steps(), off);
        } else {
            // Where the schedule ends above zero, that much noise stays: the one it began with where none was added.
            let rest = remainder(&schedule, end, &x0, &noise);
            let same = distance(&x, &rest);
            let fresh = off <= 6.0 * end + allowed;
            prop_assert!(same <= allowed || (adds_noise(kind, &schedule) && fresh), "{} {}: off by {}", kind, schedule.steps(), same);
        }
    }
}

/// What a boundary condition or a path of finite resolution leaves.
fn slack(kind: SchedulerKind, steps: usize) -> f64 {
    match kind {
        // c_skip of a timestep: 0.25/(10·19)² of the noise in the latents, more below it.
        SchedulerKind::Lcm => 5e-2,
        // Where a step is a good part of σ, Adams' fourth order is at the edge of its stability: roundings grow with
        // the number of steps.
        SchedulerKind::Lms if steps > 50 => 5e-2,
        SchedulerKind::Lms => 1e-3,
        _ => 0.0,
    }
}

fn adds_noise(kind: SchedulerKind, schedule: &Schedule) -> bool {
    let sde = matches!(
        kind,
        SchedulerKind::Dpmpp2mSde
            | SchedulerKind::SaSolver
            | SchedulerKind::Tcd
            | SchedulerKind::DpmppSinglestep
            | SchedulerKind::EdmDpmpp2m
    );
    sde || schedule.options.eta.is_some_and(|eta| eta > 0.0)
}

/// Clean latents with the noise of a level.
fn remainder(schedule: &Schedule, sigma: f64, x0: &Latents, noise: &Latents) -> Latents {
    let norm = (1.0 + sigma * sigma).sqrt();
    let (a, s) = match schedule.convention {
        Convention::Exploding | Convention::Preconditioned { .. } => (1.0, sigma),
        Convention::Preserving => (1.0 / norm, sigma / norm),
    };
    let mut rest = x0.clone();
    rest.zip_mut_with(noise, |x, &n| {
        *x = (a * f64::from(*x) + s * f64::from(n)) as f32;
    });
    rest
}
