//! Reference pictures and area masks against Pillow, transformers and diffusers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::Path;

use image::RgbImage;
use safetensors::SafeTensors;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tronie::image::{
    Filter, Window, area_at, area_mask, clip_pixels, read_picture, resize, resize_window,
};
use tronie::manifest::PixelRule;
use tronie::request::Crop;

#[derive(Deserialize)]
struct Golden {
    resizes: Vec<Resize>,
    rules: BTreeMap<String, PixelRule>,
    clips: Vec<Clip>,
    masks: Vec<Mask>,
    files: Vec<String>,
}

type Size = (usize, usize);

#[derive(Deserialize)]
struct Resize {
    kind: String,
    before: Size,
    after: Size,
    filter: String,
    sha256: String,
}

#[derive(Deserialize)]
struct Clip {
    rule: String,
    before: Size,
    crop: Crop,
    sha256: String,
}

#[derive(Deserialize)]
struct Mask {
    before: Size,
    size: Size,
    sha256: String,
    grids: Vec<Grid>,
}

#[derive(Deserialize)]
struct Grid {
    factor: usize,
    grid: Size,
}

/// The golden file's bytes and what its header says.
fn golden() -> (Vec<u8>, Golden) {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/pictures.safetensors"
    );
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let document = &header.metadata().as_ref().unwrap()["document"];
    let golden = serde_json::from_str(document).unwrap();
    (bytes, golden)
}

/// The pictures of `export/golden/pictures.py`.
fn formula(kind: &str, (width, height): Size) -> RgbImage {
    let level = |x: u32, y: u32, c: u32| {
        let (x, y) = match kind {
            "blocks" => (x / 9, y / 7),
            _ => (x, y),
        };
        let value =
            x.wrapping_mul(73_856_093) ^ y.wrapping_mul(19_349_663) ^ c.wrapping_mul(83_492_791);
        let value = (value ^ (value >> 13)).wrapping_mul(1_540_483_477);
        let level = (value >> 15) as u8;
        match kind {
            "blocks" if level >= 128 => 255,
            "blocks" => 0,
            _ => level,
        }
    };
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        image::Rgb([level(x, y, 0), level(x, y, 1), level(x, y, 2)])
    })
}

fn sha256(bytes: &[u8]) -> String {
    let digits: Vec<_> = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    digits.concat()
}

fn filter(name: &str) -> Filter {
    match name {
        "bicubic" => Filter::Bicubic,
        "lanczos" => Filter::Lanczos,
        other => panic!("no filter {other}"),
    }
}

#[test]
fn resizing_is_pillows_to_the_last_level() {
    for case in golden().1.resizes {
        let picture = formula(&case.kind, case.before);
        let resized = resize(&picture, case.after, filter(&case.filter));
        assert_eq!(
            sha256(resized.as_raw()),
            case.sha256,
            "{} {:?} to {:?}, {}",
            case.kind,
            case.before,
            case.after,
            case.filter
        );
    }
}

#[test]
fn a_window_is_a_part_of_the_whole() {
    let picture = formula("noise", (61, 97));
    for size in [(200, 31), (61, 40), (30, 97), (61, 97)] {
        let whole = resize(&picture, size, Filter::Lanczos);
        let window = Window {
            columns: 3..28,
            rows: 9..30,
        };
        let part = resize_window(&picture, size, Filter::Lanczos, &window);
        let expected = image::imageops::crop_imm(&whole, 3, 9, 25, 21).to_image();
        assert_eq!(part, expected, "{size:?}");
    }
}

#[test]
fn an_encoder_gets_the_bits_of_transformers_processor() {
    let (_, golden) = golden();
    for case in &golden.clips {
        let kind = if case.rule == "half" {
            "blocks"
        } else {
            "noise"
        };
        let picture = formula(kind, case.before);
        let pixels = clip_pixels(&picture, &golden.rules[&case.rule], case.crop);
        let bytes: Vec<u8> = pixels
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let name = format!("{}, {:?}, {:?}", case.rule, case.before, case.crop);
        assert_eq!(sha256(&bytes), case.sha256, "{name}");
    }
}

#[test]
fn masks_are_those_of_diffusers() {
    let (bytes, golden) = golden();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("mask.png");
    for (index, case) in golden.masks.iter().enumerate() {
        formula("blocks", case.before).save(&path).unwrap();
        let mask = area_mask(&path, case.size).unwrap();
        assert_eq!(mask.dim(), (case.size.1, case.size.0));
        let levels: Vec<u8> = mask.iter().map(|value| *value as u8).collect();
        assert_eq!(sha256(&levels), case.sha256, "mask {index}");
        for Grid { factor, grid } in &case.grids {
            let expected = tensors.tensor(&format!("mask.{index}.{factor}")).unwrap();
            let expected = expected.data().as_chunks::<4>().0;
            let values = area_at(&mask, *grid);
            assert_eq!(values.len(), expected.len());
            for (place, (value, expected)) in values.iter().zip(expected).enumerate() {
                let expected = f32::from_le_bytes(*expected);
                assert!(
                    (value - expected).abs() <= 1e-6,
                    "mask {index} on {grid:?}, {place}: {value} instead of {expected}"
                );
            }
        }
    }
}

#[test]
fn the_transparent_part_of_a_mask_is_outside() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("mask.png");
    // White everywhere, but only the left half can be seen.
    let drawn = image::RgbaImage::from_fn(64, 32, |x, _| {
        image::Rgba([255, 255, 255, if x < 32 { 255 } else { 0 }])
    });
    drawn.save(&path).unwrap();
    let mask = area_mask(&path, (128, 64)).unwrap();
    for ((_, x), value) in mask.indexed_iter() {
        assert_eq!(value.to_bits(), f32::from(u8::from(x < 64)).to_bits());
    }
    assert_eq!(area_at(&mask, (1, 2)), [1.0, 0.0]);
}

fn read(folder: &Path, content: &[u8]) -> tronie::Result<RgbImage> {
    let path = folder.join("picture");
    std::fs::write(&path, content).unwrap();
    read_picture(&path)
}

#[test]
fn pictures_of_every_kind_are_read_as_pillow_reads_them() {
    let (bytes, golden) = golden();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = TempDir::new().unwrap();
    for name in &golden.files {
        let content = tensors.tensor(&format!("{name}.file")).unwrap();
        let expected = tensors.tensor(&format!("{name}.levels")).unwrap();
        let picture = read(folder.path(), content.data()).unwrap();
        let shape = [picture.height() as usize, picture.width() as usize, 3];
        assert_eq!(shape, expected.shape(), "{name}");
        let apart = picture.as_raw().iter().zip(expected.data());
        let apart = apart.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert_eq!(apart, 0, "{name}: levels apart");
    }
}

#[test]
fn of_sixteen_bits_of_grey_the_upper_eight_count() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("grey.png");
    let levels = [0_u16, 255, 256, 0x7FFF, 0x8000, 0xFFFF];
    let drawn = image::ImageBuffer::from_fn(6, 1, |x, _| image::Luma([levels[x as usize]]));
    drawn.save(&path).unwrap();
    let picture = read_picture(&path).unwrap();
    let read: Vec<u8> = picture.pixels().map(|pixel| pixel[1]).collect();
    assert_eq!(read, [0, 0, 1, 127, 128, 255]);
}
