//! Shares and means of what the judge found, each with the bar that it should reach.

use serde::Serialize;

use super::Subject;
use super::judge::Verdict;
use super::questions::{Prompt, Questions, STYLE};

/// What should be reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bar {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Bar {
    pub(super) const ATTRIBUTE: Self = Self::AtLeast(0.9);
    pub(super) const IDENTITY: Self = Self::AtLeast(0.8);
    pub(super) const STYLE: Self = Self::AtLeast(0.9);
    pub(super) const IDENTITY_OF_BOTH: Self = Self::AtLeast(0.7);
    pub(super) const STYLE_OF_BOTH: Self = Self::AtLeast(0.8);
    /// The refiner keeps sharpness (a ratio) and, to a point, the judge's confidence (a difference), or adds to them.
    pub(super) const SHARPNESS: Self = Self::AtLeast(1.0);
    pub(super) const CONFIDENCE: Self = Self::AtLeast(-0.01);
    pub(super) const POINTS_LOST: Self = Self::AtMost(0.05);

    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bar) => value >= bar,
            Self::AtMost(bar) => value <= bar,
        }
    }
}

/// One measured number.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// Whose pictures.
    pub subject: Subject,
    /// What of them: an attribute, or what the number is.
    pub what: String,
    /// A share, a difference of shares, a mean or a ratio.
    pub value: f64,
    /// Of how many pictures.
    pub count: usize,
    /// What it should reach.
    pub bar: Option<Bar>,
    /// Whether it does; `None` without a bar.
    pub met: Option<bool>,
}

impl Measure {
    fn new(subject: Subject, what: impl Into<String>, (value, count): (f64, usize)) -> Self {
        Self {
            subject,
            what: what.into(),
            value,
            count,
            bar: None,
            met: None,
        }
    }

    fn with(mut self, bar: Bar) -> Self {
        self.met = Some(bar.is_met(self.value));
        self.bar = Some(bar);
        self
    }
}

/// What is seen of a painted picture.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Seen {
    pub verdict: Verdict,
    /// Mean gradient energy.
    pub sharpness: f64,
}

/// Of each attribute, the share of the prompts that name it whose pictures have it.
pub(super) fn attributes(questions: &Questions, prompts: &[Prompt], seen: &[Seen]) -> Vec<Measure> {
    let shares = shares(questions, prompts, seen);
    let measures = shares.into_iter().map(|(attribute, share)| {
        Measure::new(Subject::Text, attribute, share).with(Bar::ATTRIBUTE)
    });
    measures.collect()
}

/// Of each attribute, by how much the share sinks from many steps to few.
pub(super) fn points_lost(
    questions: &Questions,
    prompts: &[Prompt],
    many: &[Seen],
    few: &[Seen],
) -> Vec<Measure> {
    let (before, after) = (
        shares(questions, prompts, many),
        shares(questions, prompts, few),
    );
    let pairs = before.into_iter().zip(after);
    let measures = pairs.map(|((attribute, (many, count)), (_, (few, _)))| {
        let what = format!("{attribute}, share lost");
        Measure::new(Subject::Lightning, what, (many - few, count)).with(Bar::POINTS_LOST)
    });
    measures.collect()
}

/// What the refiner does to sharpness and to the judge's confidence in what it sees.
pub(super) fn refined(plain: &[Seen], fine: &[Seen]) -> Vec<Measure> {
    let [before, after] = [plain, fine].map(|seen| mean(seen.iter().map(|one| one.sharpness)));
    let [unsure, sure] = [plain, fine].map(|seen| mean(seen.iter().map(confidence)));
    let count = fine.len();
    let of = |what: &str, value| Measure::new(Subject::Refiner, what, (value, count));
    vec![
        of("sharpness without it", before),
        of("sharpness with it", after),
        of("sharpness, with over without", after / before).with(Bar::SHARPNESS),
        of("confidence without it", unsure),
        of("confidence with it", sure),
        of("confidence, with less without", sure - unsure).with(Bar::CONFIDENCE),
    ]
}

/// The share of pictures that have the style that they should.
pub(super) fn agreement<'a>(
    questions: &Questions,
    subject: Subject,
    styles: impl Iterator<Item = &'a str>,
    seen: &[Seen],
    bar: Bar,
) -> Measure {
    let hits = styles
        .zip(seen)
        .filter(|(style, one)| has(questions, one, STYLE, style));
    let share = (hits.count() as f64 / seen.len().max(1) as f64, seen.len());
    Measure::new(subject, STYLE, share).with(bar)
}

/// The share of pictures that are nearest to the gallery of the person that they should show, `own` by picture.
pub(super) fn identities(
    subject: Subject,
    own: &[usize],
    galleries: &[Vec<f32>],
    seen: &[Seen],
    bar: Bar,
) -> Measure {
    let nearest = |one: &Seen| {
        let cosine = |gallery: &Vec<f32>| -> f32 {
            let pairs = gallery.iter().zip(&one.verdict.embedding);
            pairs.map(|(a, b)| a * b).sum()
        };
        let cosines = galleries.iter().map(cosine).enumerate();
        cosines
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|best| best.0)
    };
    let hits = own
        .iter()
        .zip(seen)
        .filter(|(own, one)| nearest(one) == Some(**own));
    let share = (hits.count() as f64 / seen.len().max(1) as f64, seen.len());
    let what = format!("identity, nearest of {}", galleries.len());
    Measure::new(subject, what, share).with(bar)
}

/// Attributes that a prompt names, with the share of pictures that have them and the number of prompts.
fn shares(questions: &Questions, prompts: &[Prompt], seen: &[Seen]) -> Vec<(String, (f64, usize))> {
    let named = questions.choices.iter().filter_map(|choice| {
        let attribute = &choice.attribute;
        let asked = prompts.iter().zip(seen);
        let asked = asked.filter_map(|(prompt, one)| Some((prompt.expect.get(attribute)?, one)));
        let asked = asked.collect::<Vec<_>>();
        let hits = asked
            .iter()
            .filter(|(value, one)| has(questions, one, attribute, value));
        let share = hits.count() as f64 / asked.len().max(1) as f64;
        (!asked.is_empty()).then(|| (attribute.clone(), (share, asked.len())))
    });
    named.collect()
}

fn has(questions: &Questions, one: &Seen, attribute: &str, value: &str) -> bool {
    questions
        .place(attribute, value)
        .is_ok_and(|(choice, value)| {
            one.verdict
                .answers
                .get(choice)
                .is_some_and(|a| a.0 == value)
        })
}

fn confidence(one: &Seen) -> f64 {
    mean(one.verdict.answers.iter().map(|answer| answer.1))
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions() -> Questions {
        let json = r#"{"choices": {"style": ["ink", "oil"], "hair": ["bald", "bun", "long"]}}"#;
        serde_json::from_str(json).unwrap()
    }

    fn seen(style: usize, hair: usize, embedding: [f32; 2]) -> Seen {
        Seen {
            verdict: Verdict {
                answers: vec![(style, 0.5), (hair, 1.0)],
                embedding: embedding.into(),
            },
            sharpness: 0.25,
        }
    }

    fn prompt(attribute: &str, value: &str) -> Prompt {
        let json = serde_json::json!({"prompt": "x", "seed": 1, "expect": {attribute: value}});
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn choices_keep_the_order_of_the_logits() {
        let names = questions().choices.into_iter().map(|c| c.attribute);
        assert!(names.eq(["style", "hair"]));
    }

    #[test]
    fn each_attribute_is_a_share_of_the_prompts_that_name_it() {
        let prompts = [
            prompt("hair", "bun"),
            prompt("hair", "bald"),
            prompt("style", "oil"),
        ];
        let found = [
            seen(0, 1, [1.0, 0.0]),
            seen(0, 2, [1.0, 0.0]),
            seen(1, 0, [1.0, 0.0]),
        ];
        let measures = attributes(&questions(), &prompts, &found);
        let told = measures
            .iter()
            .map(|m| (m.what.as_str(), m.value, m.count, m.met));
        let expected = [("style", 1.0, 1, Some(true)), ("hair", 0.5, 2, Some(false))];
        assert!(told.eq(expected));
        let lost = points_lost(&questions(), &prompts, &found, &found);
        assert!(lost.iter().all(|m| m.value == 0.0 && m.met == Some(true)));
    }

    #[test]
    fn an_identity_is_the_nearest_gallery() {
        let galleries = [vec![1.0, 0.0], vec![0.0, 1.0]];
        let found = [seen(0, 0, [0.8, 0.6]), seen(0, 0, [0.8, 0.6])];
        let measure = identities(
            Subject::Identity,
            &[0, 1],
            &galleries,
            &found,
            Bar::IDENTITY,
        );
        assert_eq!((measure.value, measure.met), (0.5, Some(false)));
    }

    #[test]
    fn a_refiner_that_changes_nothing_reaches_its_bars() {
        let found = [seen(0, 0, [1.0, 0.0])];
        let measures = refined(&found, &found);
        assert!(measures.iter().all(|m| m.met != Some(false)));
        assert!((measures[3].value - 0.75).abs() < 1e-12);
    }
}
