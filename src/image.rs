//! Pictures: latents' values to pixels, PNG files that carry the request that made them, and reference pictures and area
//! masks from the user.

mod area;
mod pixels;
mod read;
mod resize;

use std::io::{Cursor, Write};
use std::path::Path;

use image::RgbImage;
use ndarray::ArrayView3;

pub use area::{area_at, area_mask};
pub use pixels::clip_pixels;
pub use read::read_picture;
pub use resize::{Filter, Window, resize, resize_window};

use crate::error::{Error, Result};
use crate::files::read_input;
use crate::request::Request;

/// Keyword of the PNG text chunk that holds the request as JSON.
const KEYWORD: &str = "tronie";
/// Largest picture file that is read.
const MAX_PICTURE_BYTES: u64 = 1 << 30;
/// What `inspect` is willing to read into memory for a picture's text.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// Pixels `[3, height, width]` in -1..=1 to 8 bits, half to even as numpy rounds.
///
/// Twin: `VaeImageProcessor.postprocess`.
pub fn to_rgb(pixels: &ArrayView3<'_, f32>) -> RgbImage {
    let (_, height, width) = pixels.dim();
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let channel = |c| {
            let unit = (pixels[[c, y as usize, x as usize]] / 2.0 + 0.5).clamp(0.0, 1.0);
            (unit * 255.0).round_ties_even() as u8
        };
        image::Rgb([channel(0), channel(1), channel(2)])
    })
}

/// Encodes a PNG with the request inside.
///
/// # Errors
/// The writer's.
pub fn write_png(to: &mut dyn Write, picture: &RgbImage, request: &Request) -> std::io::Result<()> {
    let json = serde_json::to_string(request)?;
    let mut encoder = png::Encoder::new(to, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .add_itxt_chunk(KEYWORD.to_owned(), json)
        .map_err(std::io::Error::other)?;
    let mut writer = encoder.write_header().map_err(std::io::Error::other)?;
    writer
        .write_image_data(picture.as_raw())
        .map_err(std::io::Error::other)?;
    writer.finish().map_err(std::io::Error::other)
}

/// The request inside a picture that tronie made.
///
/// # Errors
/// [`Error::Input`] when the file is no PNG, or has no request in it.
pub fn read_request(path: &Path) -> Result<Request> {
    let fail = |reason: String| Error::Input {
        path: path.to_owned(),
        reason,
    };
    let bytes = read_input(path, MAX_PICTURE_BYTES)?;
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_limits(png::Limits {
        bytes: MAX_TEXT_BYTES,
    });
    let reader = decoder
        .read_info()
        .map_err(|e| fail(format!("is not a PNG picture: {e}")))?;
    let chunk = reader
        .info()
        .utf8_text
        .iter()
        .find(|chunk| chunk.keyword == KEYWORD);
    let chunk = chunk.ok_or_else(|| {
        fail("has no request in it; it was not made by tronie, or was edited since".into())
    })?;
    let json = chunk
        .get_text()
        .map_err(|e| fail(format!("its request cannot be read: {e}")))?;
    Request::from_json(&json, path)
}

/// Whether a file starts like a PNG.
pub fn is_png(path: &Path) -> bool {
    // Opening a pipe would wait for its writer.
    if !path.is_file() {
        return false;
    }
    let mut head = [0; 8];
    let read =
        std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut head));
    read.is_ok() && head == *b"\x89PNG\r\n\x1a\n"
}

/// How far two pictures of one size are apart.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Difference {
    /// Peak signal-to-noise ratio over all channels, dB; `None` for equal pictures, whose ratio is infinite.
    pub psnr_db: Option<f64>,
    /// The largest difference of two levels, 0 to 255.
    pub largest_level: u8,
}

/// Compares two pictures; `None` when their sizes differ.
pub fn difference(a: &RgbImage, b: &RgbImage) -> Option<Difference> {
    if a.dimensions() != b.dimensions() {
        return None;
    }
    let apart = || {
        let levels = a.as_raw().iter().zip(b.as_raw());
        levels.map(|(a, b)| a.abs_diff(*b))
    };
    let squares = apart().map(|d| u64::from(d).pow(2)).sum::<u64>();
    let mean = squares as f64 / a.as_raw().len() as f64;
    let peak = f64::from(u8::MAX);
    Some(Difference {
        psnr_db: (squares > 0).then(|| 10.0 * (peak * peak / mean).log10()),
        largest_level: apart().max().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_scaled_rounded_and_clamped() {
        // 0 is 127.5 levels exactly, and the even neighbour is 128.
        let values = [0.0, -7.0, 7.0, 200.0 / 255.0 * 2.0 - 1.0];
        let pixels = ndarray::Array3::from_shape_fn((3, 1, 4), |(_, _, x)| values[x]);
        let row: Vec<u8> = to_rgb(&pixels.view()).pixels().map(|p| p[0]).collect();
        assert_eq!(row, [128, 0, 255, 200]);
    }

    #[test]
    fn a_picture_carries_its_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let request = Request {
            prompt: "ein Mädchen\nmit 🦜".into(),
            seed: Some(u64::MAX.into()),
            ..Request::default()
        };
        let picture = RgbImage::from_pixel(3, 2, image::Rgb([1, 2, 3]));
        let mut bytes = Vec::new();
        write_png(&mut bytes, &picture, &request).unwrap();
        std::fs::write(&path, bytes).unwrap();
        assert!(is_png(&path));
        assert_eq!(read_request(&path).unwrap(), request);
        assert_eq!(image::open(&path).unwrap().to_rgb8(), picture);
    }

    #[test]
    fn the_difference_of_pictures_is_in_decibels() {
        let plain = RgbImage::from_pixel(4, 2, image::Rgb([10, 20, 30]));
        let mut other = plain.clone();
        assert_eq!(
            difference(&plain, &other),
            Some(Difference {
                psnr_db: None,
                largest_level: 0
            })
        );
        // One of 24 levels is 6 off: a mean square of 1.5.
        other.put_pixel(1, 1, image::Rgb([10, 26, 30]));
        let found = difference(&plain, &other).unwrap();
        assert_eq!(found.largest_level, 6);
        assert!((found.psnr_db.unwrap() - 46.369_891).abs() < 1e-5);
        assert_eq!(difference(&plain, &RgbImage::new(4, 3)), None);
    }
}
