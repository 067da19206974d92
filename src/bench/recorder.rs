//! Listens to a pipeline's events with a clock and a watch on memory.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::memory::Watch;
use crate::progress::{Event, Stage};

/// A stretch of a run: loading one network, encoding with one, the denoising steps of one, decoding.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lap {
    /// What is done.
    pub stage: Stage,
    /// With which network or model.
    pub what: String,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Anonymous memory when it began, bytes; `None` where the system does not tell.
    pub anonymous_bytes_before: Option<u64>,
    /// The highest anonymous memory meanwhile, bytes; `None` where the system does not tell.
    pub anonymous_bytes_peak: Option<u64>,
}

/// One denoising step.
#[derive(Debug, Clone)]
pub(super) struct StepTime {
    pub model: String,
    pub whole: Duration,
    /// The part of it inside ONNX Runtime.
    pub inside: Duration,
    /// Whether it is the first of its network in its run.
    pub first: bool,
}

/// What one run of a pipeline was like.
#[derive(Debug)]
pub(super) struct Recorder<'a> {
    watch: Option<&'a Watch>,
    open: Option<Open>,
    step: Option<Begun>,
    pub laps: Vec<Lap>,
    pub steps: Vec<StepTime>,
}

#[derive(Debug)]
struct Open {
    stage: Stage,
    what: String,
    since: Instant,
    anonymous: Option<u64>,
}

/// A step that is under way.
#[derive(Debug)]
struct Begun {
    since: Instant,
    busy: Duration,
    first: bool,
}

impl<'a> Recorder<'a> {
    pub fn new(watch: Option<&'a Watch>) -> Self {
        Self {
            watch,
            open: None,
            step: None,
            laps: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Takes an event; `busy` is the time inside ONNX Runtime so far.
    pub fn hear(&mut self, event: &Event<'_>, busy: Duration) {
        let now = Instant::now();
        match event {
            Event::Stage { stage, what } => {
                let anonymous = self.close(now);
                self.open = Some(Open {
                    stage: *stage,
                    what: (*what).to_owned(),
                    since: now,
                    anonymous,
                });
                self.begin_step(busy, true);
            }
            Event::Step { .. } => {
                if let (Some(begun), Some(open)) = (&self.step, &self.open) {
                    self.steps.push(StepTime {
                        model: open.what.clone(),
                        whole: now - begun.since,
                        inside: busy.saturating_sub(begun.busy),
                        first: begun.first,
                    });
                }
                self.begin_step(busy, false);
            }
            _ => {}
        }
    }

    /// Ends the last lap.
    pub fn finish(&mut self) {
        self.close(Instant::now());
    }

    fn begin_step(&mut self, busy: Duration, first: bool) {
        self.step = Some(Begun {
            since: Instant::now(),
            busy,
            first,
        });
    }

    /// Ends the lap that is open; the anonymous memory of now.
    fn close(&mut self, now: Instant) -> Option<u64> {
        let memory = self.watch.map(Watch::lap);
        if let Some(open) = self.open.take() {
            self.laps.push(Lap {
                stage: open.stage,
                what: open.what,
                seconds: (now - open.since).as_secs_f64(),
                anonymous_bytes_before: open.anonymous,
                anonymous_bytes_peak: memory.map(|(peak, _)| peak),
            });
        }
        memory.map(|(_, now)| now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Latents;

    #[test]
    fn steps_are_told_apart_by_model_and_place() {
        let latents = Latents::zeros((1, 4, 2, 2));
        let stage = |stage, what| Event::Stage { stage, what };
        let step = |done| Event::Step {
            done,
            total: 3,
            latents: &latents,
        };
        let mut recorder = Recorder::new(None);
        let ms = Duration::from_millis;
        recorder.hear(&stage(Stage::Load, "unet of base"), ms(0));
        recorder.hear(&stage(Stage::Denoise, "base"), ms(1));
        recorder.hear(&step(1), ms(4));
        recorder.hear(&step(2), ms(9));
        recorder.hear(&stage(Stage::Denoise, "refiner"), ms(9));
        recorder.hear(&step(3), ms(10));
        recorder.finish();
        let seen = recorder
            .steps
            .iter()
            .map(|s| (s.model.as_str(), s.inside, s.first));
        let expected = [
            ("base", ms(3), true),
            ("base", ms(5), false),
            ("refiner", ms(1), true),
        ];
        assert!(seen.eq(expected));
        let laps = recorder.laps.iter().map(|l| (l.stage, l.what.as_str()));
        let expected = [
            (Stage::Load, "unet of base"),
            (Stage::Denoise, "base"),
            (Stage::Denoise, "refiner"),
        ];
        assert!(laps.eq(expected));
    }
}
