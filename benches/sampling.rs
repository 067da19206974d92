//! Host maths of a run at 1024×1024: noise, planning a schedule, one step of every scheduler.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot set itself up fails by panicking"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use serde_json::json;
use tronie::noise::Noise;
use tronie::schedule::{SamplingOptions, Schedule, SchedulerConfig, SigmaCurve};
use tronie::schedulers::{Scheduler, SchedulerKind, Step};
use tronie::tensor::Latents;

/// The latents of one picture of 1024×1024.
const SHAPE: [usize; 4] = [1, 4, 128, 128];
const VALUES: u64 = 4 * 128 * 128;
const STEPS: usize = 30;
const NETWORK: Duration = Duration::from_millis(50);
/// The configuration that SDXL base 1.0 comes with.
const SDXL: &str = include_str!("../export/configs/sdxl-base/scheduler/scheduler_config.json");

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    noise(&mut criterion);
    schedules(&mut criterion);
    steps(&mut criterion);
    criterion.final_summary();
}

fn noise(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("noise");
    group.throughput(Throughput::Elements(VALUES));
    let mut noise = Noise::new(1);
    group.bench_function("latents of 1024²", |b| b.iter(|| noise.normal(SHAPE)));
    group.finish();
}

fn schedules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("schedule of 30 steps");
    let config = SchedulerConfig::from_json(SDXL).unwrap();
    for &kind in SchedulerKind::ALL {
        for &curve in kind.curves() {
            let options = options(Some(curve));
            let id = BenchmarkId::new(kind.name(), curve.name());
            group.bench_function(id, |b| {
                b.iter(|| kind.plan(black_box(&config), &options).unwrap());
            });
        }
    }
    group.finish();
}

/// What one step in the middle of a run takes beside the network. Its outputs are made beforehand and come after `NETWORK`,
/// a shorter time than that of any SDXL UNet at this size: what a scheduler does meanwhile costs nothing.
fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step at 1024²");
    group.throughput(Throughput::Elements(VALUES));
    let config = SchedulerConfig::from_json(SDXL).unwrap();
    let (latents, output) = (Noise::new(1).normal(SHAPE), Noise::new(2).normal(SHAPE));
    for &kind in SchedulerKind::ALL {
        let schedule = kind.plan(&config, &options(None)).unwrap();
        let (history, calls) = midway(kind, &schedule, &latents, &output);
        group.bench_function(kind.name(), |b| {
            b.iter_custom(|times| {
                let one = || {
                    let mut scheduler = kind.start(&schedule).unwrap();
                    scheduler.restore(history.clone()).unwrap();
                    let (x, mut outputs) = (latents.clone(), vec![output.clone(); calls]);
                    let mut noise = Noise::new(3);
                    let at = at(&schedule, STEPS / 2, &mut noise);
                    let mut in_network = Duration::ZERO;
                    let started = Instant::now();
                    let mut denoise = |_: &Latents, _: f64| {
                        let called = Instant::now();
                        std::thread::sleep(NETWORK);
                        in_network += called.elapsed();
                        Ok(outputs.pop().unwrap())
                    };
                    black_box(scheduler.step(at, x, &mut denoise).unwrap());
                    started.elapsed().checked_sub(in_network).unwrap()
                };
                (0..times).map(|_| one()).sum()
            });
        });
    }
    group.finish();
}

/// The history that a scheduler has in the middle of a run, and how often its next step calls the network.
fn midway(
    kind: SchedulerKind,
    schedule: &Schedule,
    latents: &Latents,
    output: &Latents,
) -> (Vec<Latents>, usize) {
    let mut scheduler = kind.start(schedule).unwrap();
    let mut noise = Noise::new(3);
    let mut calls = 0;
    let mut step = |scheduler: &mut dyn Scheduler, index, x| {
        calls = 0;
        let mut denoise = |_: &Latents, _: f64| {
            calls += 1;
            Ok(output.clone())
        };
        scheduler
            .step(at(schedule, index, &mut noise), x, &mut denoise)
            .unwrap()
    };
    let x = (0..STEPS / 2).fold(latents.clone(), |x, index| {
        step(scheduler.as_mut(), index, x)
    });
    let history = scheduler.history();
    step(scheduler.as_mut(), STEPS / 2, x);
    (history, calls)
}

fn at<'a>(schedule: &'a Schedule, index: usize, noise: &'a mut Noise) -> Step<'a> {
    Step {
        schedule,
        index,
        prediction: schedule.prediction,
        noise,
    }
}

/// What is left out is the configuration's; JSON, as the struct has no default on which more fields could rest.
fn options(sigmas: Option<SigmaCurve>) -> SamplingOptions {
    serde_json::from_value(json!({ "steps": STEPS, "sigmas": sigmas })).unwrap()
}
