//! A reference picture as an image encoder takes it.

use image::RgbImage;
use ndarray::{Array3, s};

use super::resize::{Filter, Window, resize, resize_window};
use crate::manifest::PixelRule;
use crate::request::Crop;

/// Pixels `[3, size, size]`, normalised, of a picture.
///
/// Twin: transformers' `CLIPImageProcessorPil`, bit for bit, where `crop` is [`Crop::Center`].
pub fn clip_pixels(picture: &RgbImage, rule: &PixelRule, crop: Crop) -> Array3<f32> {
    let size = rule.size;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    match crop {
        _ if picture.is_empty() || size == 0 => Array3::zeros((3, size, size)),
        Crop::Center => {
            let long = |long: usize, short: usize| size * long / short;
            let resized = if width <= height {
                (size, long(height, width))
            } else {
                (long(width, height), size)
            };
            let middle = |long: usize| (long - size) / 2..(long - size) / 2 + size;
            let window = Window {
                columns: middle(resized.0),
                rows: middle(resized.1),
            };
            let square = resize_window(picture, resized, Filter::Bicubic, &window);
            normalised(&square, rule)
        }
        Crop::Pad => {
            let short = |short: usize, long: usize| rounded(size * short, long).max(1);
            let resized = if width <= height {
                (short(width, height), size)
            } else {
                (size, short(height, width))
            };
            let fitted = normalised(&resize(picture, resized, Filter::Bicubic), rule);
            let (left, top) = ((size - resized.0) / 2, (size - resized.1) / 2);
            let mut padded = Array3::zeros((3, size, size));
            let inside = s![.., top..top + resized.1, left..left + resized.0];
            padded.slice_mut(inside).assign(&fitted);
            padded
        }
        Crop::Stretch => normalised(&resize(picture, (size, size), Filter::Bicubic), rule),
    }
}

/// The quotient to the nearest whole number.
fn rounded(a: usize, b: usize) -> usize {
    (a + b / 2) / b
}

/// Levels to normalised values: to 0..=1 in f64, the rest in f32, as the reference does.
fn normalised(picture: &RgbImage, rule: &PixelRule) -> Array3<f32> {
    let unit = 1.0 / 255.0;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let (mean, std) = (
        rule.mean.map(|value| value as f32),
        rule.std.map(|value| value as f32),
    );
    let levels = picture.as_raw();
    Array3::from_shape_fn((3, height, width), |(channel, y, x)| {
        let level = f64::from(levels[(y * width + x) * 3 + channel]);
        ((level * unit) as f32 - mean[channel]) / std[channel]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: PixelRule = PixelRule {
        size: 8,
        mean: [0.5, 0.25, 0.125],
        std: [0.5, 0.5, 0.25],
    };

    #[test]
    fn bars_are_zero_and_the_picture_lies_between_them() {
        let white = RgbImage::from_pixel(30, 12, image::Rgb([255; 3]));
        let padded = clip_pixels(&white, &RULE, Crop::Pad);
        // 12/30 of 8 rows is 3.2.
        for (row, values) in padded.axis_iter(ndarray::Axis(1)).enumerate() {
            let inside = (2..5).contains(&row);
            for (channel, value) in [1.0_f32, 1.5, 3.5].into_iter().enumerate() {
                let expected = if inside { value } else { 0.0 };
                assert!(
                    values
                        .row(channel)
                        .iter()
                        .all(|v| v.to_bits() == expected.to_bits())
                );
            }
        }
    }

    #[test]
    fn a_picture_of_any_shape_becomes_square() {
        for (width, height) in [(1, 1), (1, 60_000), (60_000, 1), (7, 8), (8, 8)] {
            let picture = RgbImage::from_pixel(width, height, image::Rgb([9; 3]));
            for crop in [Crop::Center, Crop::Pad, Crop::Stretch] {
                let pixels = clip_pixels(&picture, &RULE, crop);
                assert_eq!(pixels.dim(), (3, 8, 8), "{width}x{height}, {crop:?}");
            }
        }
        let nothing = clip_pixels(&RgbImage::new(0, 0), &RULE, Crop::Center);
        assert_eq!(nothing.dim(), (3, 8, 8));
    }

    #[test]
    fn a_crop_has_a_name_and_a_default() {
        assert_eq!(Crop::default(), Crop::Center);
        let named: Vec<Crop> = serde_json::from_str(r#"["center","pad","stretch"]"#).unwrap();
        assert_eq!(named, [Crop::Center, Crop::Pad, Crop::Stretch]);
        assert!(serde_json::from_str::<Crop>(r#""fit""#).is_err());
    }
}
