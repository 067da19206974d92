//! How good generated pictures are: what a small network, the judge, finds in pictures that a model paints of given
//! prompts, persons and styles.
//!
//! A folder holds the judge (`judge.onnx.gz`, a graph without weights, and `judge.safetensors`) and the questions
//! (`quality.json`). The judge gives logits of attributes and an embedding of whose face it is.
//!
//! Python twin: none; the judge is exported by `export/judge.py`.

mod judge;
mod measures;
mod questions;
mod subject;

use std::path::{Path, PathBuf};

use image::RgbImage;

use crate::error::{Error, Result};
use crate::pipeline::Pipeline;
use crate::progress::Observer;
use crate::request::{ImagePrompt, ImageScale, LoraUse, Request, Seeds};
use judge::{Judge, Verdict};
pub use measures::{Bar, Measure};
use measures::{Seen, agreement, attributes, identities, points_lost, refined};
use questions::Questions;
pub use subject::Subject;

/// Most pictures that one request paints.
const BATCH: usize = 8;

/// What is asked of a model.
#[derive(Debug, Clone)]
pub struct Exam {
    /// The folder with judge and questions.
    pub folder: PathBuf,
    /// Model, provider and whatever else all pictures share.
    pub request: Request,
    /// What is measured; empty for all that the questions have.
    pub only: Vec<Subject>,
    /// How many questions of each kind, from the first; `None` for all.
    pub count: Option<usize>,
}

/// Paints and judges everything that is asked for. `begun` hears of every subject how many pictures it takes.
///
/// # Errors
/// [`Error::Missing`], [`Error::Input`] for a folder that is incomplete or contradicts itself; those of
/// [`Pipeline::generate`].
pub fn examine(
    pipeline: &Pipeline,
    exam: &Exam,
    begun: &mut dyn FnMut(Subject, usize),
    observer: &mut Observer<'_>,
) -> Result<Vec<Measure>> {
    let questions = Questions::open(&exam.folder)?;
    let judge = Judge::open(pipeline.runtime(), &exam.folder, &questions.choices)?;
    let mut examiner = Examiner {
        pipeline,
        exam,
        questions: &questions,
        judge,
        observer,
        text: None,
        galleries: None,
    };
    let mut measures = Vec::new();
    for subject in Subject::ALL {
        let wanted = exam.only.is_empty() || exam.only.contains(&subject);
        let count = examiner.count(subject);
        if wanted && count == 0 && !exam.only.is_empty() {
            let reason = format!("{subject}: {} asks nothing of it", questions.path.display());
            return Err(Error::request("quality-only", reason));
        }
        if wanted && count > 0 {
            begun(subject, count);
            measures.extend(examiner.measure(subject)?);
        }
    }
    Ok(measures)
}

struct Examiner<'a, 'b> {
    pipeline: &'a Pipeline,
    exam: &'a Exam,
    questions: &'a Questions,
    judge: Judge,
    observer: &'a mut Observer<'b>,
    /// What was seen of the prompts, painted as the model's defaults say.
    text: Option<Vec<Seen>>,
    /// Every person's mean embedding.
    galleries: Option<Vec<Vec<f32>>>,
}

impl Examiner<'_, '_> {
    /// The first of a list, as many as are wanted.
    fn some<'q, T>(&self, all: &'q [T]) -> &'q [T] {
        let count = self.exam.count.unwrap_or(all.len());
        &all[..count.min(all.len())]
    }

    /// How many pictures a subject takes, beside those of `Text`.
    fn count(&self, subject: Subject) -> usize {
        let questions = self.questions;
        match subject {
            Subject::Text | Subject::Refiner | Subject::Lightning => {
                self.some(&questions.prompts).len()
            }
            Subject::Identity => self.some(&questions.persons).len(),
            Subject::Style => self.some(&questions.styles).len(),
            Subject::Both => self.some(&questions.both).len(),
            Subject::Lora => self.some(&questions.loras).len(),
        }
    }

    fn measure(&mut self, subject: Subject) -> Result<Vec<Measure>> {
        let questions = self.questions;
        let prompts = self.some(&questions.prompts);
        match subject {
            Subject::Text => Ok(attributes(questions, prompts, &self.text()?)),
            Subject::Identity => self.identity(),
            Subject::Style => self.style(),
            Subject::Both => self.both(),
            Subject::Refiner => {
                let plain = self.text()?;
                let names = &questions.with;
                let fine = self.prompts(|request| {
                    request.refiner = Some(names.refiner.clone());
                    request.refine_at = Some(names.refine_at);
                })?;
                Ok(refined(&plain, &fine))
            }
            Subject::Lightning => {
                let many = self.text()?;
                let lora = Some(whole(&questions.with.lightning));
                let few = self.prompts(|request| request.loras.clone_from(&lora))?;
                Ok(points_lost(questions, prompts, &many, &few))
            }
            Subject::Lora => {
                let asked = self.some(&questions.loras);
                let requests = asked.iter().map(|one| Request {
                    loras: Some(whole(&one.name)),
                    ..self.request(&one.prompt, one.seed)
                });
                let requests = requests.collect();
                let seen = self.see(requests)?;
                let styles = asked.iter().map(|one| one.style.as_str());
                Ok(vec![agreement(
                    questions,
                    subject,
                    styles,
                    &seen,
                    Bar::STYLE,
                )])
            }
        }
    }

    fn identity(&mut self) -> Result<Vec<Measure>> {
        let questions = self.questions;
        let asked = self.some(&questions.persons);
        let requests = asked.iter().map(|one| Request {
            image_prompts: Some(vec![self.face(&one.picture, questions.with.face_scale)]),
            ..self.request(&one.prompt, one.seed)
        });
        let seen = self.see(requests.collect())?;
        let galleries = self.galleries()?;
        let own = (0..asked.len()).collect::<Vec<_>>();
        let measure = identities(Subject::Identity, &own, &galleries, &seen, Bar::IDENTITY);
        Ok(vec![measure])
    }

    fn style(&mut self) -> Result<Vec<Measure>> {
        let questions = self.questions;
        let asked = self.some(&questions.styles);
        let requests = asked.iter().map(|one| Request {
            image_prompts: Some(vec![self.look(&one.picture, questions.with.style_scale)]),
            ..self.request(&one.prompt, one.seed)
        });
        let seen = self.see(requests.collect())?;
        let styles = asked.iter().map(|one| one.style.as_str());
        let measure = agreement(questions, Subject::Style, styles, &seen, Bar::STYLE);
        Ok(vec![measure])
    }

    fn both(&mut self) -> Result<Vec<Measure>> {
        let questions = self.questions;
        let asked = self.some(&questions.both);
        let with = &questions.with;
        let requests = asked.iter().map(|one| Request {
            image_prompts: Some(vec![
                self.face(&questions.persons[one.person].picture, with.both_face_scale),
                self.look(&one.style_picture, with.both_style_scale),
            ]),
            ..self.request(&one.prompt, one.seed)
        });
        let seen = self.see(requests.collect())?;
        let galleries = self.galleries()?;
        let own = asked.iter().map(|one| one.person).collect::<Vec<_>>();
        let styles = asked.iter().map(|one| one.style.as_str());
        Ok(vec![
            identities(
                Subject::Both,
                &own,
                &galleries,
                &seen,
                Bar::IDENTITY_OF_BOTH,
            ),
            agreement(questions, Subject::Both, styles, &seen, Bar::STYLE_OF_BOTH),
        ])
    }

    /// What is seen of the prompts as the model paints them by default.
    fn text(&mut self) -> Result<Vec<Seen>> {
        if self.text.is_none() {
            self.text = Some(self.prompts(|_| {})?);
        }
        Ok(self.text.clone().unwrap_or_default())
    }

    fn prompts(&mut self, change: impl Fn(&mut Request)) -> Result<Vec<Seen>> {
        let asked = self.some(&self.questions.prompts);
        let requests = asked.iter().map(|one| {
            let mut request = self.request(&one.text, one.seed);
            change(&mut request);
            request
        });
        self.see(requests.collect())
    }

    fn galleries(&mut self) -> Result<Vec<Vec<f32>>> {
        if self.galleries.is_none() {
            self.galleries = Some(self.look_at_galleries()?);
        }
        Ok(self.galleries.clone().unwrap_or_default())
    }

    fn look_at_galleries(&mut self) -> Result<Vec<Vec<f32>>> {
        let persons = self.questions.persons.iter();
        persons
            .map(|person| {
                let pictures = person.gallery.iter();
                let pictures = pictures.map(|file| crate::image::read_picture(&self.file(file)));
                let verdicts = self.judge.judge(&pictures.collect::<Result<Vec<_>>>()?)?;
                Ok(Verdict::mean_embedding(&verdicts))
            })
            .collect()
    }

    fn request(&self, prompt: &str, seed: u64) -> Request {
        Request {
            prompt: prompt.to_owned(),
            seed: Some(seed.into()),
            ..self.exam.request.clone()
        }
    }

    fn face(&self, picture: &Path, scale: f64) -> ImagePrompt {
        self.image_prompt(&self.questions.with.face, picture, scale)
    }

    fn look(&self, picture: &Path, scale: f64) -> ImagePrompt {
        self.image_prompt(&self.questions.with.style, picture, scale)
    }

    fn image_prompt(&self, adapter: &str, picture: &Path, scale: f64) -> ImagePrompt {
        ImagePrompt {
            adapter: adapter.to_owned(),
            pictures: vec![self.file(picture)],
            scale: Some(ImageScale::Number(scale)),
            ..ImagePrompt::default()
        }
    }

    fn file(&self, name: &Path) -> PathBuf {
        self.exam.folder.join(name)
    }

    /// Paints requests and looks at their pictures, which stay in order.
    fn see(&mut self, requests: Vec<Request>) -> Result<Vec<Seen>> {
        let mut seen = vec![Seen::default(); requests.len()];
        for (request, places) in batches(requests) {
            let output = self.pipeline.generate(&request, self.observer)?;
            let verdicts = self.judge.judge(&output.pictures)?;
            let looks = output.pictures.iter().zip(verdicts);
            for (place, (picture, verdict)) in places.into_iter().zip(looks) {
                seen[place] = Seen {
                    verdict,
                    sharpness: sharpness(picture),
                };
            }
        }
        Ok(seen)
    }
}

fn whole(lora: &str) -> Vec<LoraUse> {
    let (lora, scale, te_scale) = (lora.to_owned(), 1.0, None);
    vec![LoraUse {
        lora,
        scale,
        te_scale,
    }]
}

/// Requests that differ in their seeds only become one, with the places that they had.
fn batches(requests: Vec<Request>) -> Vec<(Request, Vec<usize>)> {
    let mut batches = Vec::<(Request, Vec<u64>, Vec<usize>)>::new();
    for (place, mut request) in requests.into_iter().enumerate() {
        let seeds = request.seed.take();
        let seeds = seeds.as_ref().map_or(&[][..], Seeds::all);
        let fitting = batches.iter_mut().find(|(known, its, _)| {
            *known == request && its.len() + seeds.len() <= BATCH && !seeds.is_empty()
        });
        match fitting {
            Some((_, its, places)) => {
                its.extend(seeds);
                places.push(place);
            }
            None => batches.push((request, seeds.to_vec(), vec![place])),
        }
    }
    let whole = batches.into_iter().map(|(mut request, seeds, places)| {
        request.seed = Seeds::each(seeds);
        (request, places)
    });
    whole.collect()
}

/// Mean gradient energy: squared differences of neighbours' luma, `0.0..=1.0`, across and down.
fn sharpness(picture: &RgbImage) -> f64 {
    let luma = |x: u32, y: u32| {
        let [r, g, b] = picture.get_pixel(x, y).0.map(f64::from);
        (0.299 * r + 0.587 * g + 0.114 * b) / 255.0
    };
    let (width, height) = picture.dimensions();
    let mut energy = 0.0;
    for y in 1..height {
        for x in 1..width {
            let here = luma(x, y);
            energy += (here - luma(x - 1, y)).powi(2) + (here - luma(x, y - 1)).powi(2);
        }
    }
    energy / f64::from((width.max(2) - 1) * (height.max(2) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_differ_in_seeds_only_are_painted_together() {
        let request = |prompt: &str, seed: u64| Request {
            prompt: prompt.into(),
            seed: Some(seed.into()),
            ..Request::default()
        };
        let asked = vec![request("a", 1), request("b", 2), request("a", 3)];
        let batches = batches(asked);
        let places = batches.iter().map(|(_, places)| places.clone());
        assert!(places.eq([vec![0, 2], vec![1]]));
        assert_eq!(batches[0].0.seed, Seeds::each(vec![1, 3]));
        let many = (0..20).map(|seed| request("a", seed)).collect();
        let sizes = super::batches(many).into_iter().map(|(_, p)| p.len());
        assert!(sizes.eq([8, 8, 4]));
    }

    #[test]
    fn edges_are_sharp_and_flat_pictures_are_not() {
        let flat = RgbImage::from_pixel(8, 8, image::Rgb([90, 90, 90]));
        assert!(sharpness(&flat).abs() < 1e-12);
        let stripes = RgbImage::from_fn(9, 9, |x, _| image::Rgb([255 * (x % 2) as u8; 3]));
        assert!((sharpness(&stripes) - 1.0).abs() < 1e-9);
        assert!(sharpness(&RgbImage::new(1, 1)).abs() < 1e-12);
    }
}
