//! Pictures of the user's, whatever camera or program they come from, as RGB.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{
    DynamicImage, ImageBuffer, ImageDecoder, ImageError, ImageFormat, ImageReader, Luma, LumaA,
    Pixel, Rgb, RgbImage, Rgba,
};
use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder, PixelFormat};

use super::MAX_PICTURE_BYTES;
use crate::error::{Error, Result};
use crate::files::read_input;

/// Most pixels of a picture: the largest sensors of telephones have as many. Decoded, that is 2 GB at worst.
const MAX_PIXELS: u64 = 200_000_000;
/// Longest side, pixels: JPEG's.
const MAX_SIDE: u32 = 65_535;
/// Most memory for what surrounds the pixels: colour profiles, comments.
const MAX_METADATA_BYTES: u64 = 64 << 20;
/// Most passes over a JPEG's pixels: cameras and editors make about ten.
const MAX_SCANS: usize = 500;
/// What may be told to someone whose picture is not read.
const READ: &str = "PNG, JPEG, WebP and BMP are read";

/// The first picture of a file, turned upright.
///
/// As Pillow reads it: the EXIF orientation is applied, transparency lies over white, of 16 bits the upper 8 count (of
/// grey too, which Pillow's conversion clips at 255 of 65535), CMYK is Adobe's inverted one, converted without profiles,
/// and embedded profiles are ignored. The format is found in the content; the name does not matter. Levels of a JPEG are
/// those of libjpeg-turbo, which Pillow reads with.
///
/// # Errors
/// [`Error::Input`] when the file is no picture of these formats, is damaged or cut off, or has more than 200 million
/// pixels or 65535 on a side, which is seen before memory is taken for them.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    read_over(path, 255)
}

/// [`read_picture`] with transparency over grey of level `ground`.
pub(super) fn read_over(path: &Path, ground: u8) -> Result<RgbImage> {
    let bytes = read_input(path, MAX_PICTURE_BYTES)?;
    decode(&bytes, ground).map_err(|reason| Error::Input {
        path: path.to_owned(),
        reason,
    })
}

fn decode(bytes: &[u8], ground: u8) -> Result<RgbImage, String> {
    if bytes.is_empty() {
        return Err(format!("is empty; {READ}"));
    }
    let (decoded, orientation) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => decode_jpeg(bytes)?,
        Ok(format @ (ImageFormat::Png | ImageFormat::WebP | ImageFormat::Bmp)) => {
            decode_other(bytes, format)?
        }
        Ok(format) => {
            return Err(format!(
                "is a {format:?} file; {READ}: save it as one of them"
            ));
        }
        Err(_) => {
            return Err(format!(
                "is not a picture of a known format; {READ}: save it as one of them"
            ));
        }
    };
    let mut upright = DynamicImage::ImageRgb8(opaque(decoded, ground)?);
    upright.apply_orientation(orientation);
    Ok(upright.into_rgb8())
}

fn damaged(format: ImageFormat, reason: impl std::fmt::Display) -> String {
    format!(
        "cannot be read as {format:?}: {reason}; it is damaged or cut off: get it anew, or open it in an image editor \
         and save it as PNG"
    )
}

fn check_size((width, height): (u32, u32)) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err("has no pixels".into());
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS || width.max(height) > MAX_SIDE {
        return Err(format!(
            "has {width} x {height} pixels; at most {MAX_PIXELS}, and {MAX_SIDE} on a side, are read: make it smaller"
        ));
    }
    Ok(())
}

fn orientation(exif: Option<&[u8]>) -> Orientation {
    // Some programs keep JPEG's mark in front of it in the other formats too.
    exif.map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
        .and_then(Orientation::from_exif_chunk)
        .unwrap_or(Orientation::NoTransforms)
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<(DynamicImage, Orientation), String> {
    let fail = |error: ImageError| match error {
        ImageError::Limits(_) => format!(
            "is too large for what is read: {MAX_PIXELS} pixels, {MAX_SIDE} on a side, and {MAX_METADATA_BYTES} bytes \
             beside them; make it smaller, or save it without profile and comments"
        ),
        error => damaged(format, error),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(MAX_METADATA_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(fail)?;
    check_size(decoder.dimensions())?;
    let orientation = orientation(decoder.exif_metadata().map_err(fail)?.as_deref());
    let decoded = DynamicImage::from_decoder(decoder).map_err(fail)?;
    Ok((decoded, orientation))
}

/// Strictly, where the `image` crate fills what is missing with grey.
fn decode_jpeg(bytes: &[u8]) -> Result<(DynamicImage, Orientation), String> {
    let fail = |error| damaged(ImageFormat::Jpeg, error);
    if !has_jpeg_end(bytes) {
        return Err(fail("its end is missing".into()));
    }
    let limits = DecodeLimits {
        max_width: MAX_SIDE as usize,
        max_height: MAX_SIDE as usize,
        max_pixels: u64::MAX,
        max_scans: MAX_SCANS,
        max_memory: None,
    };
    let decoder = Decoder::new_with_limits(bytes, limits).map_err(|e| fail(e.to_string()))?;
    let (width, height) = (decoder.header().width(), decoder.header().height());
    let (width, height) = (width as u32, height as u32);
    check_size((width, height))?;
    let bits = decoder.header().precision;
    if bits != 8 {
        return Err(format!("has {bits} bits per colour; save it with 8"));
    }
    let orientation = decoder.exif_orientation();
    let orientation = orientation.and_then(Orientation::from_exif);
    let inks = matches!(
        decoder.jpeg_color_space(),
        ColorSpace::Cmyk | ColorSpace::Ycck
    );
    let wanted = if inks {
        PixelFormat::Cmyk
    } else {
        PixelFormat::Rgb
    };
    let decoder = decoder
        .with_output_format(wanted)
        .with_stop_on_warning(true);
    let decoded = decoder.decode_image().map_err(|e| fail(e.to_string()))?;
    let mut levels = decoded.into_vec();
    if inks {
        levels = levels
            .as_chunks()
            .0
            .iter()
            .flat_map(|inks| inverted_inks(*inks))
            .collect();
    }
    let decoded = RgbImage::from_raw(width, height, levels);
    let decoded = decoded.ok_or_else(|| fail("pixels are missing".into()))?;
    Ok((
        DynamicImage::ImageRgb8(decoded),
        orientation.unwrap_or(Orientation::NoTransforms),
    ))
}

/// Red, green and blue of Adobe's inks, where 255 is none, rounded as Pillow does.
fn inverted_inks([cyan, magenta, yellow, key]: [u8; 4]) -> [u8; 3] {
    let light = u32::from(key);
    [cyan, magenta, yellow].map(|ink| {
        let product = (255 - u32::from(ink)) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

/// Whether a JPEG's segments lead to its end mark. Strict decoding alone takes zeros for what is missing of the last blocks.
fn has_jpeg_end(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    // A mark is 0xFF, repeated at will, and a number; 0xFF and 0 among the pixels is no mark.
    while let Some(at) = rest
        .windows(2)
        .position(|pair| pair[0] == 0xFF && pair[1] != 0xFF)
    {
        let mark = rest[at + 1];
        rest = &rest[at + 2..];
        match mark {
            0xD9 => return true,
            0 | 1 | 0xD0..=0xD8 => {}
            _ => {
                let length = match rest {
                    [high, low, ..] => usize::from(u16::from_be_bytes([*high, *low])),
                    _ => return false,
                };
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
    false
}

/// Eight bits of three colours, over `ground` where the picture is transparent.
fn opaque(decoded: DynamicImage, ground: u8) -> Result<RgbImage, String> {
    let upper = |value: u16| (value >> 8) as u8;
    let over = |colour: [u8; 3], alpha: u8| colour.map(|level| blend(level, ground, alpha));
    Ok(match decoded {
        DynamicImage::ImageRgb8(picture) => picture,
        DynamicImage::ImageLuma8(picture) => each(&picture, |Luma([l])| [*l; 3]),
        DynamicImage::ImageLumaA8(picture) => each(&picture, |LumaA([l, a])| over([*l; 3], *a)),
        DynamicImage::ImageRgba8(picture) => {
            each(&picture, |Rgba([r, g, b, a])| over([*r, *g, *b], *a))
        }
        DynamicImage::ImageLuma16(picture) => each(&picture, |Luma([l])| [upper(*l); 3]),
        DynamicImage::ImageLumaA16(picture) => {
            each(&picture, |LumaA([l, a])| over([upper(*l); 3], upper(*a)))
        }
        DynamicImage::ImageRgb16(picture) => each(&picture, |Rgb(colour)| colour.map(upper)),
        DynamicImage::ImageRgba16(picture) => each(&picture, |Rgba([r, g, b, a])| {
            over([*r, *g, *b].map(upper), upper(*a))
        }),
        other => {
            return Err(format!(
                "has pixels of type {:?}; save it with 8 bits per colour",
                other.color()
            ));
        }
    })
}

fn each<P: Pixel>(
    picture: &ImageBuffer<P, Vec<P::Subpixel>>,
    colour: impl Fn(&P) -> [u8; 3],
) -> RgbImage {
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| {
        Rgb(colour(picture.get_pixel(x, y)))
    })
}

/// A level of opacity `alpha` over another, rounded as Pillow's `alpha_composite` does.
fn blend(level: u8, ground: u8, alpha: u8) -> u8 {
    const PRECISION: u32 = 7;
    let (level, ground, alpha) = (u32::from(level), u32::from(ground), u32::from(alpha));
    let sum = (level * alpha + ground * (255 - alpha) + 0x80) << PRECISION;
    ((((sum >> 8) + sum) >> 8) >> PRECISION) as u8
}
