//! Warns of requests that a distilled model or LoRA was not made for.
//!
//! Paper: "SDXL-Lightning: Progressive Adversarial Diffusion Distillation" (Lin, Wang, Yang, 2024).

use super::Pipeline;
use crate::error::Result;
use crate::plan::Guidance;
use crate::progress::{Event, Observer};
use crate::request::Resolved;
use crate::schedule::{SamplingOptions, Schedule};

/// Timesteps that a message lists.
const LISTED: usize = 8;

impl Pipeline {
    /// Warns of steps, timesteps and guidance that a distilled model was not trained for.
    pub(super) fn warn_of_distillation(
        &self,
        request: &Resolved,
        schedule: &Schedule,
        guidance: &Guidance,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        for (name, steps) in &request.distilled {
            for warning in warnings(name, *steps, request, schedule, guidance) {
                self.notify(observer, Event::Warning(&warning), 0)?;
            }
        }
        Ok(())
    }
}

/// What is told of the model or LoRA called `name`, which was distilled for `trained` steps.
fn warnings(
    name: &str,
    trained: usize,
    request: &Resolved,
    schedule: &Schedule,
    guidance: &Guidance,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let steps = schedule.steps();
    if steps != trained {
        let many = if trained == 1 { "" } else { "s" };
        warnings.push(format!(
            "`{name}` was distilled for {trained} step{many}, not {steps}; its pictures suffer"
        ));
    }
    // The same scheduler with nothing but the model's own configuration.
    let own = request
        .scheduler
        .plan(&request.scheduler_config, &SamplingOptions::steps(steps));
    let own = own.ok().filter(|own| own.timesteps != schedule.timesteps);
    if let Some(own) = own {
        warnings.push(format!(
            "`{name}` was distilled for the timesteps {}, not {}; leave out spacing, sigmas and lists of them",
            list(&own.timesteps),
            list(&schedule.timesteps)
        ));
    }
    let guided = (0..steps).find(|step| guidance.is_on(*step));
    if let Some(scale) = guided.and_then(|step| guidance.scales.get(step)) {
        warnings.push(format!(
            "`{name}` was distilled to paint without guidance; guidance {scale} doubles the work and spoils pictures"
        ));
    }
    warnings
}

fn list(timesteps: &[f64]) -> String {
    let shown = timesteps.iter().take(LISTED).map(f64::to_string);
    let shown = shown.collect::<Vec<_>>().join(", ");
    let more = if timesteps.len() > LISTED {
        ", …"
    } else {
        ""
    };
    format!("{shown}{more}")
}
