//! Cuts a schedule where its network, or what that network is told, changes.

use std::ops::Range;

use super::Pipeline;
use crate::conditioning::{Prompts, Told};
use crate::error::{Error, Result};
use crate::plan::Guidance;
use crate::request::{ImagePrompt, Resolved};
use crate::schedule::Schedule;

/// A segment before anything is encoded.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cut<'a> {
    pub steps: Range<usize>,
    /// The first step of this model.
    pub since: usize,
    pub model: &'a str,
    pub positive: Told,
    /// `None` where guidance is off.
    pub negative: Option<Told>,
    /// The image prompts that rule, by their places in the request.
    pub images: Vec<usize>,
}

impl Pipeline {
    /// The segments that `steps` need.
    pub(super) fn cuts<'a>(
        &self,
        request: &'a Resolved,
        schedule: &Schedule,
        guidance: &Guidance,
        steps: &Range<usize>,
    ) -> Result<Vec<Cut<'a>>> {
        let mut cuts = Vec::<Cut<'a>>::new();
        for (name, span) in spans(request, schedule)? {
            if span.start.max(steps.start) >= span.end.min(steps.end) {
                continue;
            }
            let model = self.catalogue().model("model", name)?;
            schedule.accepts(self.scheduler_config(request, name)?.prediction()?)?;
            let prompts = Prompts::new(&request.request, model)?;
            let all = schedule.steps();
            for step in span.clone() {
                let negative = guidance.is_on(step).then(|| prompts.negative(step, all));
                let next = Cut {
                    steps: step..step + 1,
                    since: span.start,
                    model: name,
                    positive: prompts.positive(step, all),
                    negative,
                    images: images_at(request, name, step, all),
                };
                match cuts.last_mut().filter(|last| last.goes_on_as(&next)) {
                    Some(last) => last.steps.end = step + 1,
                    None => cuts.push(next),
                }
            }
        }
        cuts.retain(|cut| cut.steps.start.max(steps.start) < cut.steps.end.min(steps.end));
        Ok(cuts)
    }
}

impl Cut<'_> {
    fn goes_on_as(&self, next: &Self) -> bool {
        let told = |cut: &Self| (cut.model.to_owned(), cut.since);
        told(self) == told(next)
            && (&self.positive, &self.negative, &self.images)
                == (&next.positive, &next.negative, &next.images)
    }
}

/// The image prompts that a model is told at a zero-based step of `steps`, by their places in the request.
fn images_at(request: &Resolved, model: &str, step: usize, steps: usize) -> Vec<usize> {
    let share = step as f64 / steps as f64;
    let rules = |prompt: &ImagePrompt| {
        prompt
            .steps
            .is_none_or(|s| s.start <= share && share < s.end)
    };
    let prompts = request.image_prompts(model);
    prompts
        .filter(|(_, prompt)| rules(prompt))
        .map(|(at, _)| at)
        .collect()
}

/// What `steps` of these segments cost, in a sentence.
pub(super) fn cost(
    request: &Resolved,
    schedule: &Schedule,
    cuts: &[Cut<'_>],
    steps: &Range<usize>,
) -> Result<String> {
    let mut parts = Vec::new();
    let (mut evaluations, mut at) = (0, 0);
    while let Some(first) = cuts.get(at) {
        let of_model = cuts[at..].iter().take_while(|c| c.since == first.since);
        let of_model = of_model.collect::<Vec<_>>();
        at += of_model.len();
        let end = of_model.last().map_or(first.since, |cut| cut.steps.end);
        let calls = request.scheduler.calls(schedule, first.since..end)?;
        let of_steps = |cut: &Cut<'_>| {
            let steps = cut.steps.start.max(steps.start)..cut.steps.end.min(steps.end);
            calls[steps.start - first.since..steps.end - first.since]
                .iter()
                .sum::<usize>()
        };
        let all = of_model.iter().map(|cut| of_steps(cut)).sum::<usize>();
        let guided = of_model.iter().filter(|cut| cut.negative.is_some());
        let guided = guided.map(|cut| of_steps(cut)).sum::<usize>();
        evaluations += all + guided;
        let model = first.model;
        parts.push(format!(
            "{model}'s UNet {all} times, {guided} with guidance"
        ));
    }
    let all = evaluations * request.batch;
    let pictures = match request.batch {
        1 => String::new(),
        batch => format!(", {all} for {batch} pictures"),
    };
    Ok(format!(
        "{}: {evaluations} evaluations{pictures}",
        parts.join("; ")
    ))
}

/// The models of a request and the steps that each runs.
fn spans<'a>(request: &'a Resolved, schedule: &Schedule) -> Result<Vec<(&'a str, Range<usize>)>> {
    let Some((refiner, at)) = &request.refine else {
        return Ok(vec![(&request.model, 0..schedule.steps())]);
    };
    let cut = schedule.handoff(*at);
    if cut == 0 || cut == schedule.steps() {
        let who = if cut == 0 { "base" } else { "refiner" };
        let reason = format!(
            "{at} leaves no step of {} for the {who}; use more steps or another share",
            schedule.steps()
        );
        return Err(Error::request("refine-at", reason));
    }
    Ok(vec![
        (&request.model, 0..cut),
        (refiner, cut..schedule.steps()),
    ])
}
