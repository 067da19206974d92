//! Resizing as Pillow does it, to the last level: its fixed-point arithmetic, across first, then down.
//!
//! Twin: Pillow's `Resample.c` for 8 bits per channel. (`fast_image_resize` was tried: it starts with the other axis and
//! narrows its coefficients further, and is up to 46 levels away on noise.)

use std::f64::consts::PI;
use std::ops::Range;

use image::RgbImage;
use rayon::prelude::*;

/// Bits behind the point of a coefficient: 8 are the level's, 2 hold sums above one.
const PRECISION: u32 = 32 - 8 - 2;
const CHANNELS: usize = 3;

/// The kernel that weighs the neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Cubic with `A = -0.5`, two pixels to each side.
    Bicubic,
    /// Windowed sinc, three pixels to each side.
    Lanczos,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let far = x.abs();
        match self {
            Self::Bicubic if far < 1.0 => ((A + 2.0) * far - (A + 3.0)) * far * far + 1.0,
            Self::Bicubic if far < 2.0 => (((far - 5.0) * far + 8.0) * far - 4.0) * A,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * PI;
    x.sin() / x
}

/// A rectangle of the resized picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Its columns.
    pub columns: Range<usize>,
    /// Its rows.
    pub rows: Range<usize>,
}

/// A picture in another size, width first. Where it shrinks, the kernel widens, so nothing aliases.
pub fn resize(picture: &RgbImage, (width, height): (usize, usize), filter: Filter) -> RgbImage {
    let whole = Window {
        columns: 0..width,
        rows: 0..height,
    };
    resize_window(picture, (width, height), filter, &whole)
}

/// The part of a resized picture that lies in a window, without computing the rest.
///
/// The window must lie inside `width` and `height`; a picture without pixels gives black.
pub fn resize_window(
    picture: &RgbImage,
    (width, height): (usize, usize),
    filter: Filter,
    window: &Window,
) -> RgbImage {
    let (columns, rows) = (window.columns.clone(), window.rows.clone());
    let mut resized = RgbImage::new(columns.len() as u32, rows.len() as u32);
    let (from_width, from_height) = (picture.width() as usize, picture.height() as usize);
    if picture.is_empty() || resized.is_empty() {
        return resized;
    }
    // An axis that keeps its length is not filtered.
    let across = (width != from_width).then(|| taps(from_width, width, filter, columns.clone()));
    let down = (height != from_height).then(|| taps(from_height, height, filter, rows.clone()));
    let needed = match &down {
        Some(taps) => needed(taps),
        None => rows,
    };

    let (line, out_line) = (from_width * CHANNELS, columns.len() * CHANNELS);
    let source = &picture.as_raw()[needed.start * line..needed.end * line];
    let mut narrowed = vec![0; needed.len() * out_line];
    let lines = narrowed
        .par_chunks_exact_mut(out_line)
        .zip(source.par_chunks_exact(line));
    match &across {
        Some(taps) => lines.for_each(|(out, line)| filter_line(taps, line, out)),
        None => lines.for_each(|(out, line)| {
            out.copy_from_slice(&line[columns.start * CHANNELS..columns.end * CHANNELS]);
        }),
    }
    match &down {
        Some(taps) => resized
            .par_chunks_exact_mut(out_line)
            .zip(taps.par_iter())
            .for_each(|(out, taps)| {
                let first = (taps.first - needed.start) * out_line;
                sum_lines(&taps.weights, &narrowed[first..], out);
            }),
        None => resized.copy_from_slice(&narrowed),
    }
    resized
}

/// What one pixel of the result is made of: neighbours from `first` on, with weights in fixed point.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter, wanted: Range<usize>) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let widening = scale.max(1.0);
    let support = filter.support() * widening;
    let narrowing = 1.0 / widening;
    wanted
        .map(|at| {
            let centre = (at as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let mut weights: Vec<f64> = (first..end)
                .map(|x| filter.weight((x as f64 - centre + 0.5) * narrowing))
                .collect();
            let sum = weights.iter().sum::<f64>();
            if sum != 0.0 {
                for weight in &mut weights {
                    *weight /= sum;
                }
            }
            let one = f64::from(1 << PRECISION);
            let weights = weights
                .iter()
                .map(|weight| (weight * one + 0.5_f64.copysign(*weight)) as i32)
                .collect();
            Taps { first, weights }
        })
        .collect()
}

fn needed(taps: &[Taps]) -> Range<usize> {
    let start = taps.iter().map(|t| t.first).min().unwrap_or_default();
    let end = taps.iter().map(|t| t.first + t.weights.len()).max();
    start..end.unwrap_or_default()
}

const HALF: i32 = 1 << (PRECISION - 1);

fn level(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

fn filter_line(taps: &[Taps], line: &[u8], out: &mut [u8]) {
    for (pixel, taps) in out.chunks_exact_mut(CHANNELS).zip(taps) {
        let mut sums = [HALF; CHANNELS];
        let neighbours = line[taps.first * CHANNELS..].chunks_exact(CHANNELS);
        for (neighbour, weight) in neighbours.zip(&taps.weights) {
            for (sum, value) in sums.iter_mut().zip(neighbour) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (value, sum) in pixel.iter_mut().zip(sums) {
            *value = level(sum);
        }
    }
}

fn sum_lines(weights: &[i32], lines: &[u8], out: &mut [u8]) {
    let mut sums = vec![HALF; out.len()];
    for (line, weight) in lines.chunks_exact(out.len()).zip(weights) {
        for (sum, value) in sums.iter_mut().zip(line) {
            *sum += i32::from(*value) * weight;
        }
    }
    for (value, sum) in out.iter_mut().zip(sums) {
        *value = level(sum);
    }
}
