//! Schedulers against whole runs of diffusers, and their properties.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::float_cmp,
    reason = "where numbers are compared without a margin, bitwise equality is meant"
)]

use crate::golden_runs::Golden;
use crate::runs::{drive, from, initial, network, sdxl};
use tronie::noise::Noise;
use tronie::schedule::{
    Knob, Prediction, SamplingOptions, Schedule, SchedulerConfig, SigmaCurve, Spacing,
};
use tronie::schedulers::{SchedulerKind, Step};
use tronie::tensor::Latents;
use tronie::{Error, Result};

fn options(steps: usize) -> SamplingOptions {
    SamplingOptions::steps(steps)
}

fn plan(kind: SchedulerKind, steps: usize) -> Schedule {
    kind.plan(&sdxl(), &options(steps)).unwrap()
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), 2, "{error}");
    error.to_string()
}

#[test]
fn every_golden_run_is_reproduced() {
    let mut wrong = Vec::new();
    for kind in SchedulerKind::ALL {
        let golden = Golden::load(*kind);
        assert!(golden.cases.len() > 40, "{kind}");
        for case in &golden.cases {
            golden.check(*kind, case);
        }
        wrong.extend(golden.wrong());
        println!("{kind}: {} runs{}", golden.cases.len(), golden.worst());
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn base_and_refiner_share_the_steps_as_in_diffusers() {
    // steps, handoff, base steps, last base timestep, refiner's first timestep, its sigma
    let vectors = [
        (40, 0.8, 32, 201.0, 176.0, Some(0.51539)),
        (30, 0.8, 23, 232.0, 199.0, Some(0.56928)),
        (50, 0.8, 40, 201.0, 181.0, Some(0.52698)),
        (25, 0.8, 20, 201.0, 161.0, Some(0.48100)),
        (30, 0.9, 27, 100.0, 67.0, None),
    ];
    for (steps, at, base, last, first, sigma) in vectors {
        let schedule = plan(SchedulerKind::Euler, steps);
        let handoff = schedule.handoff(at);
        assert_eq!(
            (
                handoff,
                schedule.timesteps[handoff - 1],
                schedule.timesteps[handoff]
            ),
            (base, last, first)
        );
        if let Some(sigma) = sigma {
            assert!(
                (schedule.sigmas[handoff] - sigma).abs() < 1e-5,
                "{steps}: {}",
                schedule.sigmas[handoff]
            );
        }
    }
    let dpm = plan(SchedulerKind::Dpmpp2m, 25);
    let handoff = dpm.handoff(0.8);
    assert_eq!(
        (dpm.timesteps[handoff - 1], dpm.timesteps[handoff]),
        (229.0, 191.0)
    );
    assert!((dpm.sigmas[handoff] - 0.55036).abs() < 5e-6);
}

#[test]
fn trailing_takes_exactly_the_steps_asked_for() {
    for steps in [61, 103, 121, 122, 201, 206, 217, 223] {
        let spaced = |kind: &&SchedulerKind| kind.knobs().contains(&Knob::Spacing);
        for kind in SchedulerKind::ALL.iter().filter(spaced) {
            let asked = SamplingOptions {
                spacing: Some(Spacing::Trailing),
                ..options(steps)
            };
            let schedule = kind.plan(&sdxl(), &asked).unwrap();
            assert_eq!(schedule.steps(), steps);
            assert_eq!(schedule.timesteps[0], 999.0);
            assert!(schedule.timesteps[steps - 1] >= 0.0);
        }
    }
}

#[test]
fn an_unbroken_run_and_a_resumed_one_are_bitwise_equal() {
    let orders = |order: f64| {
        let config = sdxl().with("solver_order", order);
        let config = config.with("predictor_order", order);
        config.with("corrector_order", order)
    };
    let configs = [
        sdxl(),
        orders(1.0),
        orders(3.0),
        sdxl().with("skip_prk_steps", false),
        sdxl().with("algorithm_type", "sde-dpmsolver++"),
    ];
    for kind in SchedulerKind::ALL {
        for config in &configs {
            let Ok(schedule) = kind.plan(config, &options(9)) else {
                // These have one algorithm.
                let single = [
                    SchedulerKind::Dpmpp2m,
                    SchedulerKind::Deis,
                    SchedulerKind::SaSolver,
                ];
                assert!(single.contains(kind), "{kind}");
                continue;
            };
            let start = initial(&schedule, [2, 4, 4, 6]);
            let unbroken = drive(*kind, &schedule, start.clone(), 0..9).unwrap();
            for cut in 1..9 {
                let half = drive(*kind, &schedule, start.clone(), 0..cut).unwrap();
                let resumed = drive(*kind, &schedule, half, cut..9).unwrap();
                assert_eq!(resumed, unbroken, "{kind} cut at {cut}");
            }
        }
    }
}

#[test]
fn the_last_step_to_zero_is_the_denoised_latents() {
    for kind in [
        SchedulerKind::Euler,
        SchedulerKind::EulerAncestral,
        SchedulerKind::Heun,
        SchedulerKind::Dpm2,
        SchedulerKind::Dpm2Ancestral,
        SchedulerKind::DpmppSde,
        SchedulerKind::Dpmpp2m,
        SchedulerKind::Dpmpp2mSde,
        SchedulerKind::DpmppSinglestep,
        SchedulerKind::Unipc,
    ] {
        let config = sdxl().with("prediction_type", "sample");
        let schedule = kind.plan(&config, &options(20)).unwrap();
        let start = initial(&schedule, [1, 4, 2, 2]);
        let x = drive(kind, &schedule, start, 0..19).unwrap().latents;
        let mut scheduler = kind.start(&schedule).unwrap();
        let x0 = from(7, [1, 4, 2, 2]);
        let at = Step {
            schedule: &schedule,
            index: 19,
            prediction: schedule.prediction,
            noise: &mut Noise::new(0),
        };
        assert_eq!(
            scheduler.step(at, x, &mut |_, _| Ok(x0.clone())).unwrap(),
            x0,
            "{kind}"
        );
    }
}

#[test]
fn names_are_read_and_listed() {
    for kind in SchedulerKind::ALL {
        assert_eq!(kind.name().parse::<SchedulerKind>().unwrap(), *kind);
        assert_eq!(serde_json::to_string(kind).unwrap(), format!("\"{kind}\""));
    }
    assert!(
        message("heunn".parse::<SchedulerKind>()).contains("euler, euler-ancestral, heun, ddim")
    );
    assert!(message("even".parse::<Spacing>()).contains("leading, trailing, linspace"));
    let curves = "normal, karras, exponential, beta, ays";
    assert!(message("cosine".parse::<SigmaCurve>()).contains(curves));
    assert_eq!(SchedulerKind::of(&sdxl()).unwrap(), SchedulerKind::Euler);
    for kind in SchedulerKind::ALL {
        let config = sdxl().with("_class_name", kind.class());
        let config = match kind {
            SchedulerKind::Dpmpp2mSde => config.with("algorithm_type", "sde-dpmsolver++"),
            _ => config,
        };
        assert_eq!(SchedulerKind::of(&config).unwrap(), *kind);
    }
    let other = sdxl().with("_class_name", "FlowMatchHeunDiscreteScheduler");
    assert!(message(SchedulerKind::of(&other)).contains("FlowMatchHeunDiscreteScheduler"));
}

const UNSUPPORTED: [(SchedulerKind, &str, &str); 27] = [
    (SchedulerKind::Ddim, "thresholding", "true"),
    (SchedulerKind::Ddim, "clip_sample", "1"),
    (SchedulerKind::Ddpm, "variance_type", "\"learned_range\""),
    (SchedulerKind::Dpmpp2m, "thresholding", "true"),
    (
        SchedulerKind::Dpmpp2m,
        "algorithm_type",
        "\"sde-dpmsolver++\"",
    ),
    (SchedulerKind::Dpmpp2mSde, "algorithm_type", "\"dpmsolver\""),
    (SchedulerKind::Dpmpp2m, "use_flow_sigmas", "true"),
    (SchedulerKind::Dpmpp2m, "lambda_min_clipped", "-5.1"),
    (SchedulerKind::Dpmpp2m, "variance_type", "\"learned\""),
    (SchedulerKind::Dpmpp2m, "solver_order", "4"),
    (SchedulerKind::DpmppSde, "noise_sampler_seed", "\"x\""),
    (SchedulerKind::DpmppSinglestep, "solver_type", "\"euler\""),
    (SchedulerKind::Unipc, "predict_x0", "false"),
    (SchedulerKind::Unipc, "solver_p", "\"x\""),
    (SchedulerKind::Deis, "algorithm_type", "\"x\""),
    (
        SchedulerKind::SaSolver,
        "algorithm_type",
        "\"noise_prediction\"",
    ),
    (SchedulerKind::SaSolver, "predictor_order", "5"),
    (SchedulerKind::Lcm, "original_inference_steps", "2000"),
    (SchedulerKind::Pndm, "prediction_type", "\"sample\""),
    (SchedulerKind::EdmEuler, "prediction_type", "\"sample\""),
    (SchedulerKind::EdmEuler, "sigma_data", "0"),
    (SchedulerKind::Euler, "beta_schedule", "\"sigmoid\""),
    (
        SchedulerKind::Euler,
        "prediction_type",
        "\"flow_prediction\"",
    ),
    (SchedulerKind::Euler, "timestep_spacing", "\"even\""),
    (SchedulerKind::Euler, "interpolation_type", "\"cubic\""),
    (SchedulerKind::Euler, "final_sigmas_type", "\"one\""),
    (SchedulerKind::Euler, "beta_start", "\"small\""),
];

#[test]
fn what_is_not_supported_is_said_by_name() {
    let karras = SamplingOptions {
        sigmas: Some(SigmaCurve::Karras),
        ..options(10)
    };
    let text = message(SchedulerKind::Ddim.plan(&sdxl(), &karras));
    assert!(text.contains("euler, euler-ancestral, heun"), "{text}");
    for (kind, key, value) in UNSUPPORTED {
        let config = SchedulerConfig::from_json(&format!("{{\"{key}\": {value}}}")).unwrap();
        let text = message(kind.plan(&config, &options(10)));
        assert!(text.contains(key), "{kind} {key}: {text}");
    }
    // The same key means nothing to a class that does not know it, as in diffusers.
    assert!(
        SchedulerKind::Euler
            .plan(&sdxl().with("thresholding", true), &options(10))
            .is_ok()
    );
    assert!(
        SchedulerKind::Ddim
            .plan(&sdxl().with("use_karras_sigmas", true), &options(10))
            .is_ok()
    );
    let continuous = sdxl().with("timestep_type", "continuous");
    assert!(SchedulerKind::Euler.plan(&continuous, &options(10)).is_ok());
    let continuous = continuous.with("prediction_type", "v_prediction");
    assert!(
        message(SchedulerKind::Euler.plan(&continuous, &options(10))).contains("timestep_type")
    );
}

#[test]
fn steps_that_leave_the_training_table_are_refused_with_the_limit() {
    let with = |spacing, steps| SamplingOptions {
        steps,
        spacing: Some(spacing),
        ..SamplingOptions::default()
    };
    for (kind, spacing, most) in [
        (SchedulerKind::Euler, Spacing::Leading, 999),
        (SchedulerKind::Euler, Spacing::Trailing, 1000),
        (SchedulerKind::Euler, Spacing::Linspace, 1000),
        (SchedulerKind::Ddim, Spacing::Leading, 999),
        (SchedulerKind::Dpmpp2m, Spacing::Leading, 998),
        (SchedulerKind::Dpmpp2m, Spacing::Trailing, 1000),
        (SchedulerKind::Dpmpp2m, Spacing::Linspace, 999),
    ] {
        let schedule = kind.plan(&sdxl(), &with(spacing, most)).unwrap();
        assert!(
            schedule.timesteps.iter().all(|t| (0.0..=999.0).contains(t)),
            "{kind} {spacing}"
        );
        for steps in [most + 1, 5000] {
            let text = message(kind.plan(&sdxl(), &with(spacing, steps)));
            assert!(
                text.contains(&format!("at most {most}")),
                "{kind} {spacing} {steps}: {text}"
            );
        }
        assert!(message(kind.plan(&sdxl(), &with(spacing, 0))).contains("0 steps"));
    }
}

#[test]
fn noise_prediction_without_any_signal_is_refused() {
    let config = sdxl()
        .with("rescale_betas_zero_snr", true)
        .with("timestep_spacing", "trailing");
    let text = message(SchedulerKind::Ddim.plan(&config, &options(4)));
    assert!(
        text.contains("rescale_betas_zero_snr") && text.contains("v_prediction"),
        "{text}"
    );
    let schedule = SchedulerKind::Ddim
        .plan(&config.with("prediction_type", "v_prediction"), &options(4))
        .unwrap();
    assert!(schedule.sigmas[0].is_infinite());
    assert!(schedule.accepts(Prediction::Epsilon).is_err());
    let noise = from(1, [1, 4, 2, 2]);
    assert_eq!(
        schedule
            .add_noise(0, from(2, [1, 4, 2, 2]), &noise)
            .unwrap(),
        noise
    );
}

#[test]
fn schedules_that_hardly_paint_come_with_advice() {
    let advice = |kind: SchedulerKind, config: &SchedulerConfig, options: &SamplingOptions| {
        kind.advice(config, &kind.plan(config, options).unwrap())
    };
    let euler = SchedulerKind::Euler;
    assert!(
        advice(euler, &sdxl(), &options(2))
            .unwrap()
            .contains("timestep 501 of 999")
    );
    assert_eq!(advice(euler, &sdxl(), &options(8)), None);
    let trailing = SamplingOptions {
        spacing: Some(Spacing::Trailing),
        ..options(1)
    };
    assert_eq!(advice(euler, &sdxl(), &trailing), None);
    let edm = SchedulerKind::EdmEuler;
    assert!(
        advice(edm, &sdxl(), &options(8))
            .unwrap()
            .contains("EDM preconditioning")
    );
    assert_eq!(
        advice(edm, &sdxl().with("sigma_data", 0.5), &options(8)),
        None
    );
}

#[test]
fn misuse_is_an_error_and_not_a_panic() {
    for kind in SchedulerKind::ALL {
        let schedule = plan(*kind, 5);
        let x = || from(1, [1, 4, 2, 2]);
        let step = |index, denoise: &mut tronie::schedulers::Denoise<'_>| {
            let at = Step {
                schedule: &schedule,
                index,
                prediction: Prediction::Epsilon,
                noise: &mut Noise::new(0),
            };
            kind.start(&schedule).unwrap().step(at, x(), denoise)
        };
        assert!(matches!(
            step(5, &mut |x, _| Ok(x.clone())),
            Err(Error::Request { .. })
        ));
        assert!(matches!(
            step(0, &mut |_, _| Ok(from(1, [1, 4, 2, 3]))),
            Err(Error::Contract { .. })
        ));
        assert!(matches!(
            step(0, &mut |_, _| Err(Error::Cancelled { step: 0 })),
            Err(Error::Cancelled { .. })
        ));
        assert!(
            kind.start(&schedule)
                .unwrap()
                .restore(vec![x(); 9])
                .is_err()
        );
        assert!(schedule.add_noise(0, x(), &from(1, [1, 4, 2, 3])).is_err());
        assert!(schedule.add_noise(5, x(), &x()).is_err());
    }
    let schedule = plan(SchedulerKind::Dpmpp2m, 5);
    for (index, shape) in [(0, [1, 4, 2, 2]), (1, [1, 4, 9, 9])] {
        let mut scheduler = SchedulerKind::Dpmpp2m.start(&schedule).unwrap();
        scheduler.restore(vec![from(1, shape)]).unwrap();
        let at = Step {
            schedule: &schedule,
            index,
            prediction: Prediction::Epsilon,
            noise: &mut Noise::new(0),
        };
        assert!(
            scheduler
                .step(at, from(1, [1, 4, 2, 2]), &mut |x, _| Ok(x.clone()))
                .is_err()
        );
    }
}

#[test]
fn the_stand_in_network_is_the_one_of_the_golden_files() {
    let x = Latents::from_elem((1, 1, 1, 1), 3.0);
    assert_eq!(network(&x, 1000.0)[[0, 0, 0, 0]], 0.75);
}
