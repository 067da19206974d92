//! Area masks: where in the picture an image prompt counts.
//!
//! Twin: diffusers' `IPAdapterMaskProcessor`. It guesses a layer's token grid from the mask's shape and cuts or fills what
//! does not fit; here the grid is said, so a mask of any size fits the picture.

use std::path::Path;

use image::RgbImage;
use ndarray::Array2;

use super::read::read_over;
use super::resize::{Filter, resize};
use crate::error::Result;

/// Levels from here on are inside: half of 255, rounded up.
const INSIDE: u32 = 128;

/// A mask `[height, width]` for a picture of `(width, height)`: 1 where the file is bright, 0 where it is dark or
/// transparent.
///
/// (diffusers ignores transparency, so that it depends on the colour under it.)
///
/// # Errors
/// Those of [`super::read_picture`].
pub fn area_mask(path: &Path, (width, height): (usize, usize)) -> Result<Array2<f32>> {
    Ok(binary(&read_over(path, 0)?, (width, height)))
}

fn binary(picture: &RgbImage, size: (usize, usize)) -> Array2<f32> {
    let resized = resize(picture, size, Filter::Lanczos);
    Array2::from_shape_fn((size.1, size.0), |(y, x)| {
        // Luma of ITU-R 601-2 in sixteenths of bits, as Pillow's `L`.
        let [red, green, blue] = resized.get_pixel(x as u32, y as u32).0.map(u32::from);
        let luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
        f32::from(u8::from(luma >= INSIDE))
    })
}

/// A mask on a grid `(rows, columns)` of tokens, row by row.
///
/// Bicubic with `A = -0.75` and without antialiasing, so values reach beyond 0..=1 beside an edge. Twin: torch's
/// `interpolate(mode="bicubic")`, f32 positions included.
pub fn area_at(mask: &Array2<f32>, (rows, columns): (usize, usize)) -> Vec<f32> {
    let (height, width) = mask.dim();
    if mask.is_empty() {
        return vec![0.0; rows * columns];
    }
    let across: Vec<_> = (0..columns).map(|x| cubic(x, width, columns)).collect();
    (0..rows)
        .map(|y| cubic(y, height, rows))
        .flat_map(|(lines, heights)| {
            across.iter().map(move |(places, widths)| {
                let line = |y: usize| dot(widths, places.map(|x| f64::from(mask[[y, x]])));
                dot(&heights, lines.map(line)) as f32
            })
        })
        .collect()
}

fn dot(weights: &[f64; 4], values: [f64; 4]) -> f64 {
    weights.iter().zip(values).map(|(w, v)| w * v).sum()
}

/// The four neighbours, repeated at the borders, of a place on a grid of `to`, and their weights.
fn cubic(at: usize, from: usize, to: usize) -> ([usize; 4], [f64; 4]) {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let place = from as f32 / to as f32 * (at as f32 + 0.5) - 0.5;
    let floor = place.floor();
    let rest = f64::from(place - floor);
    let last = from as isize - 1;
    let places = [-1, 0, 1, 2].map(|step| (floor as isize + step).clamp(0, last) as usize);
    let weights = [
        far(rest + 1.0),
        near(rest),
        near(1.0 - rest),
        far(2.0 - rest),
    ];
    (places, weights)
}
