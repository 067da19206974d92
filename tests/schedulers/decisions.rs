//! Where the reference is wrong: one test for every row of the table in ARCHITECTURE.md.

#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test fails by panicking; where numbers are compared without a margin, equality is meant"
)]

use crate::oracle::{distance, painted};
use crate::runs::{drive, from, initial, sdxl};
use tronie::noise::Noise;
use tronie::schedule::{
    FinalSigma, Knob, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, SigmaRange, Spacing,
};
use tronie::schedulers::{SchedulerKind, Step};

const SHAPE: [usize; 4] = [1, 4, 2, 2];

fn quirky(options: &SamplingOptions) -> SamplingOptions {
    SamplingOptions {
        diffusers_quirks: true,
        ..options.clone()
    }
}

fn plan(kind: SchedulerKind, options: &SamplingOptions) -> Schedule {
    kind.plan(&sdxl(), options).unwrap()
}

/// What a perfect network leaves between its picture and the run's end, from step `begin`.
fn left(kind: SchedulerKind, schedule: &Schedule, begin: usize) -> f64 {
    let (x0, noise) = (from(5, SHAPE), from(6, SHAPE));
    distance(&painted(kind, schedule, begin, &x0, &noise), &x0)
}

fn spaced(spacing: Spacing, steps: usize) -> SamplingOptions {
    SamplingOptions {
        spacing: Some(spacing),
        ..SamplingOptions::steps(steps)
    }
}

fn curved(curve: SigmaCurve, steps: usize) -> SamplingOptions {
    SamplingOptions {
        sigmas: Some(curve),
        ..SamplingOptions::steps(steps)
    }
}

#[test]
fn a_step_of_two_calls_is_whole() {
    // Between any two steps a run can stop, and another network take over; it has made an even number of calls.
    for kind in [
        SchedulerKind::Heun,
        SchedulerKind::Dpm2,
        SchedulerKind::Dpm2Ancestral,
        SchedulerKind::DpmppSde,
    ] {
        let schedule = plan(kind, &SamplingOptions::steps(10));
        assert_eq!(schedule.steps(), 10);
        let handoff = schedule.handoff(0.8);
        assert!(schedule.timesteps[handoff - 1] >= 200.0 && schedule.timesteps[handoff] < 200.0);
        let mut scheduler = kind.start(&schedule).unwrap();
        let mut x = initial(&schedule, SHAPE).latents;
        for index in 0..10 {
            let mut calls = 0;
            let at = Step {
                schedule: &schedule,
                index,
                prediction: schedule.prediction,
                noise: &mut Noise::new(0),
            };
            let mut count = |x: &tronie::tensor::Latents, _| {
                calls += 1;
                Ok(x.clone())
            };
            x = scheduler.step(at, x, &mut count).unwrap();
            assert_eq!(calls, if index == 9 { 1 } else { 2 }, "{kind} {index}");
        }
    }
}

#[test]
fn timesteps_of_exponential_and_beta_curves_are_rounded() {
    for kind in [
        SchedulerKind::Dpmpp2m,
        SchedulerKind::Dpmpp2mSde,
        SchedulerKind::DpmppSinglestep,
        SchedulerKind::Unipc,
        SchedulerKind::Deis,
        SchedulerKind::SaSolver,
    ] {
        for curve in [SigmaCurve::Exponential, SigmaCurve::Beta] {
            let options = curved(curve, 20);
            assert_eq!(plan(kind, &options).timesteps[0], 999.0, "{kind} {curve}");
            assert_eq!(plan(kind, &quirky(&options)).timesteps[0], 998.0);
        }
    }
}

#[test]
fn a_beta_curve_of_many_steps_runs_to_its_end() {
    // diffusers looks its place up by timestep, of which the first two are equal from 32 steps on, and runs one step too
    // far.
    for steps in [32, 50, 100] {
        let options = quirky(&curved(SigmaCurve::Beta, steps));
        let schedule = plan(SchedulerKind::Dpmpp2m, &options);
        assert_eq!(schedule.timesteps[0], schedule.timesteps[1]);
        let run = drive(
            SchedulerKind::Dpmpp2m,
            &schedule,
            initial(&schedule, SHAPE),
            0..steps,
        );
        assert!(run.unwrap().latents.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn ddim_and_pndm_arrive_where_the_next_step_starts() {
    for kind in [SchedulerKind::Ddim, SchedulerKind::Pndm] {
        for (spacing, steps) in [(Spacing::Linspace, 12), (Spacing::Trailing, 30)] {
            let options = spaced(spacing, steps);
            let right = left(kind, &plan(kind, &options), 0);
            let wrong = left(kind, &plan(kind, &quirky(&options)), 0);
            // σ of the first training timestep stays, in the noise's largest value.
            let stays = plan(kind, &options).sigmas[steps];
            let largest = from(6, SHAPE)
                .iter()
                .fold(0.0_f32, |most, n| most.max(n.abs()));
            let expected = stays * f64::from(largest);
            assert!(
                (right / expected - 1.0).abs() < 0.05,
                "{kind} {spacing}: {right}"
            );
            assert!((wrong - right).abs() > 1e-3, "{kind} {spacing}: {wrong}");
        }
        let options = spaced(Spacing::Leading, 12);
        let right = left(kind, &plan(kind, &options), 0);
        assert!((right - left(kind, &plan(kind, &quirky(&options)), 0)).abs() < 1e-5);
    }
}

#[test]
fn lms_and_pndm_may_begin_anywhere() {
    for begin in [1, 2, 5, 11] {
        let lms = plan(SchedulerKind::Lms, &SamplingOptions::steps(12));
        assert!(left(SchedulerKind::Lms, &lms, begin) < 1e-4, "{begin}");
        let pndm = plan(SchedulerKind::Pndm, &SamplingOptions::steps(12));
        let whole = left(SchedulerKind::Pndm, &pndm, 0);
        assert!((left(SchedulerKind::Pndm, &pndm, begin) - whole).abs() < 1e-3);
    }
}

#[test]
fn pndm_turns_every_velocity_into_noise_at_its_own_level() {
    let config = sdxl().with("prediction_type", "v_prediction");
    for runge_kutta in [false, true] {
        let config = config.clone().with("skip_prk_steps", !runge_kutta);
        let options = SamplingOptions::steps(12);
        let kind = SchedulerKind::Pndm;
        let right = left(kind, &kind.plan(&config, &options).unwrap(), 0);
        let wrong = left(kind, &kind.plan(&config, &quirky(&options)).unwrap(), 0);
        assert!(right < 0.1 && wrong > right + 1e-3, "{right} {wrong}");
    }
}

#[test]
fn runge_kutta_tells_the_network_the_level_that_the_latents_are_at() {
    let config = sdxl().with("skip_prk_steps", false);
    let kind = SchedulerKind::Pndm;
    // A stride of 83 has no middle.
    let options = SamplingOptions::steps(12);
    let right = left(kind, &kind.plan(&config, &options).unwrap(), 0);
    let wrong = left(kind, &kind.plan(&config, &quirky(&options)).unwrap(), 0);
    let plain = left(kind, &plan(kind, &options), 0);
    assert!((right - plain).abs() < 5e-6, "{right} {plain}");
    assert!((wrong - plain).abs() > 2e-5, "{wrong} {plain}");
}

#[test]
fn the_noise_of_the_first_timestep_stays_where_the_model_says_so() {
    for kind in [SchedulerKind::Tcd, SchedulerKind::Ddim, SchedulerKind::Pndm] {
        let schedule = plan(kind, &SamplingOptions::steps(8));
        let stays = left(kind, &schedule, 0);
        assert!((schedule.sigmas[8] - 0.029_167).abs() < 1e-5, "{kind}");
        assert!(stays > 0.02 && stays < 0.2, "{kind}: {stays}");
    }
    let config = sdxl().with("set_alpha_to_one", true);
    let kind = SchedulerKind::Ddim;
    let schedule = kind.plan(&config, &SamplingOptions::steps(8)).unwrap();
    assert!(left(kind, &schedule, 0) < 1e-4);
}

#[test]
fn unipc_ends_at_zero_with_either_function_and_any_order() {
    for solver in ["bh1", "bh2"] {
        for lower in [true, false] {
            let config = sdxl().with("solver_type", solver).with("solver_order", 3.0);
            let options = SamplingOptions {
                final_sigma: Some(FinalSigma::Zero),
                lower_order_final: Some(lower),
                ..SamplingOptions::steps(12)
            };
            let schedule = SchedulerKind::Unipc.plan(&config, &options).unwrap();
            assert!(left(SchedulerKind::Unipc, &schedule, 0) < 1e-4, "{solver}");
        }
    }
}

#[test]
fn the_brownian_path_is_that_of_the_seed() {
    let kind = SchedulerKind::DpmppSde;
    let run = |seed, config: &SchedulerConfig| {
        let schedule = kind.plan(config, &SamplingOptions::steps(6)).unwrap();
        let mut start = initial(&schedule, SHAPE);
        start.noise = Noise::new(seed);
        drive(kind, &schedule, start, 0..6).unwrap().latents
    };
    assert_eq!(run(3, &sdxl()), run(3, &sdxl()));
    assert_ne!(run(3, &sdxl()), run(4, &sdxl()));
    let configured = sdxl().with("noise_sampler_seed", 3.0);
    assert_eq!(run(4, &configured), run(3, &sdxl()));
}

#[test]
fn the_third_order_of_the_sde_is_near_that_of_the_flow_for_a_bent_path() {
    // A network whose answer bends in λ: with the sign of diffusers, the second difference is added instead of taken away,
    // and the path leaves the one that many small steps find.
    let config = sdxl().with("solver_order", 3.0);
    let kind = SchedulerKind::DpmppSinglestep;
    let config = config
        .with("solver_type", "heun")
        .with("algorithm_type", "sde-dpmsolver++")
        .with("final_sigmas_type", "sigma_min");
    let options = curved(SigmaCurve::Exponential, 30);
    let far = |options: &SamplingOptions| {
        let schedule = kind.plan(&config, options).unwrap();
        let run = drive(kind, &schedule, initial(&schedule, SHAPE), 0..30).unwrap();
        run.latents
            .iter()
            .fold(0.0_f32, |most, x| most.max(x.abs()))
    };
    assert!(far(&quirky(&options)) > far(&options));
}

#[test]
fn edm_begins_a_single_step_at_its_highest_level() {
    for kind in [SchedulerKind::EdmEuler, SchedulerKind::EdmDpmpp2m] {
        for curve in kind.curves() {
            let schedule = plan(kind, &curved(*curve, 1));
            assert!((schedule.sigmas[0] - 80.0).abs() < 1e-4, "{kind} {curve}");
        }
    }
}

#[test]
fn edm_adds_noise_at_third_order_too() {
    let config = sdxl()
        .with("algorithm_type", "sde-dpmsolver++")
        .with("solver_order", 3.0);
    let kind = SchedulerKind::EdmDpmpp2m;
    let schedule = kind.plan(&config, &SamplingOptions::steps(20)).unwrap();
    let run = drive(kind, &schedule, initial(&schedule, SHAPE), 0..20).unwrap();
    assert!(run.latents.iter().all(|value| value.is_finite()));
    assert_eq!(run.noise.positions()[0].draws, 20 * 16);
}

#[test]
fn deis_and_sa_solver_stay_above_zero_unless_a_list_says_otherwise() {
    for kind in [SchedulerKind::Deis, SchedulerKind::SaSolver] {
        let schedule = plan(kind, &SamplingOptions::steps(12));
        assert!((schedule.sigmas[12] - 0.029_167).abs() < 1e-5);
        // As in diffusers, a curve's last level stands twice: the last step changes nothing.
        let schedule = plan(kind, &curved(SigmaCurve::Karras, 12));
        assert_eq!(schedule.sigmas[11], schedule.sigmas[12]);
        let listed = SamplingOptions {
            sigmas_list: Some(vec![14.0, 5.0, 2.0, 0.8, 0.2, 0.0]),
            ..SamplingOptions::steps(5)
        };
        assert!(left(kind, &plan(kind, &listed), 0) < 1e-4, "{kind}");
    }
}

#[test]
fn options_that_do_nothing_are_refused_with_those_that_would() {
    let refuse = |kind: SchedulerKind, options: &SamplingOptions| {
        let error = kind.plan(&sdxl(), options).unwrap_err();
        assert_eq!(error.code(), 2);
        error.to_string()
    };
    let eta = SamplingOptions {
        eta: Some(0.5),
        ..SamplingOptions::steps(5)
    };
    let text = refuse(SchedulerKind::Euler, &eta);
    assert!(
        text.starts_with("eta: ") && text.ends_with("ddim, tcd"),
        "{text}"
    );
    for kind in SchedulerKind::ALL {
        if !kind.knobs().contains(&Knob::Spacing) {
            let text = refuse(*kind, &spaced(Spacing::Trailing, 5));
            assert!(text.contains("spacing") && text.contains("euler"), "{text}");
        }
    }
    let list = |sigmas: Vec<f64>, steps| SamplingOptions {
        sigmas_list: Some(sigmas),
        ..SamplingOptions::steps(steps)
    };
    let euler = SchedulerKind::Euler;
    assert!(refuse(euler, &list(vec![3.0, 2.0, 0.0], 3)).contains("one more than steps"));
    assert!(refuse(euler, &list(vec![3.0, 3.0, 0.0], 2)).contains("must fall"));
    assert!(refuse(euler, &list(vec![f64::NAN, 0.0], 1)).contains("not a number"));
    let both = SamplingOptions {
        sigmas: Some(SigmaCurve::Karras),
        ..list(vec![3.0, 0.0], 1)
    };
    assert!(refuse(euler, &both).contains("give one of the two"));
    let beyond = SamplingOptions {
        timesteps_list: Some(vec![1500.0, 3.0]),
        ..SamplingOptions::steps(2)
    };
    assert!(refuse(euler, &beyond).contains("last training timestep, 999"));
    let range = SamplingOptions {
        sigma_range: Some(SigmaRange::Table),
        ..SamplingOptions::steps(5)
    };
    assert!(refuse(euler, &range).contains("karras, exponential, beta"));
    let wild = SamplingOptions {
        eta: Some(1.5),
        ..SamplingOptions::steps(5)
    };
    assert!(refuse(SchedulerKind::Ddim, &wild).contains("0.0 to 1.0"));
}

#[test]
fn a_karras_curve_joins_the_levels_that_were_asked_for() {
    let ranged = |kind: SchedulerKind, range| {
        let options = SamplingOptions {
            sigma_range: Some(range),
            ..curved(SigmaCurve::Karras, 25)
        };
        let sigmas = plan(kind, &options).sigmas;
        (sigmas[0], sigmas[24])
    };
    // diffusers joins the spacing's ends for Euler and the table's for DPM-Solver; A1111 and ComfyUI the table's always.
    for (kind, spacing) in [
        (SchedulerKind::Euler, (11.676, 0.0413)),
        (SchedulerKind::Dpmpp2m, (11.028, 0.1963)),
    ] {
        let (high, low) = ranged(kind, SigmaRange::Spacing);
        assert!((high - spacing.0).abs() < 1e-3 && (low - spacing.1).abs() < 1e-4);
        let (high, low) = ranged(kind, SigmaRange::Table);
        assert!((high - 14.614_647).abs() < 1e-5 && (low - 0.029_167_5).abs() < 1e-6);
    }
}
