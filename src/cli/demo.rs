//! `tronie demo`: a sheet of pictures that shows what the demo model does, painted here.
//!
//! The sheet's content lies beside the demo model: captions, requests and the pictures that they show.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::time::Instant;

use image::{ImageFormat, Rgb, RgbImage, imageops};
use serde::Deserialize;

use super::args::DemoArgs;
use super::bars::Bars;
use super::console::say;
use super::generate::stop_on_ctrl_c;
use super::lettering::{LETTER, wrapped, write};
use crate::error::{Error, Result};
use crate::files::{check_writable, write_pending};
use crate::image::{Filter, read_picture, resize};
use crate::manifest::Catalogue;
use crate::memory::MemoryMode;
use crate::pipeline::{Options, Pipeline};
use crate::progress::Cancel;
use crate::request::Request;

/// Where a catalogue's sheet is.
const SHEET: &str = "models/demo-pictures/sheet.json";
/// A page of text, and pictures of some hundred px.
const MAX_BYTES: u64 = 1 << 20;
/// Side of a tile, px; pictures are fitted to it.
const TILE: u32 = 256;
const GAP: u32 = 16;
/// Lines of a caption, and px from one to the next.
const LINES: usize = 4;
const LEADING: u32 = LETTER + 4;
const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const INK: Rgb<u8> = Rgb([30, 30, 30]);

/// What is on the sheet.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sheet {
    /// Tiles side by side.
    columns: u32,
    tiles: Vec<Tile>,
}

/// A picture with its caption: one that is shown as it is, or a request that paints it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Content {
    Picture(PathBuf),
    Request(Box<Request>),
}

#[derive(Deserialize)]
struct Tile {
    caption: String,
    #[serde(flatten)]
    content: Content,
}

pub(super) fn demo(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    check_writable(&args.output)?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = Pipeline::open(Options {
        provider: args.provider,
        cancel,
        ..args.catalogue.options()
    })?;
    let folder = tempfile::tempdir().map_err(|source| Error::Output {
        path: std::env::temp_dir(),
        source,
    })?;
    let sheet = Sheet::open(pipeline.catalogue(), folder.path())?;
    let mut tiles = Vec::new();
    for tile in &sheet.tiles {
        say(&tile.caption);
        let picture = match &tile.content {
            Content::Picture(file) => read_picture(file)?,
            Content::Request(request) => paint(&pipeline, request)?,
        };
        tiles.push((picture, tile.caption.as_str()));
    }
    let drawn = drawn(&tiles, sheet.columns);
    let pending = write_pending(&args.output, |to| {
        let mut bytes = Cursor::new(Vec::new());
        drawn
            .write_to(&mut bytes, ImageFormat::Png)
            .map_err(std::io::Error::other)?;
        to.write_all(bytes.get_ref())
    })?;
    pending.publish()?;
    say(&format!("wrote {}", args.output.display()));
    say(&format!("{:.1} s", started.elapsed().as_secs_f64()));
    Ok(())
}

fn paint(pipeline: &Pipeline, request: &Request) -> Result<RgbImage> {
    let mut bars = Bars::new();
    let output = pipeline.generate(request, &mut |event| bars.show(&event));
    bars.clear();
    let mut pictures = output?.pictures.into_iter();
    pictures.next().ok_or_else(|| {
        Error::request(
            "stop-at",
            "leaves no picture; a tile's request runs to its end",
        )
    })
}

impl Sheet {
    /// Reads a catalogue's sheet, whose pictures are put into `folder`: they may lie inside the program.
    fn open(catalogue: &Catalogue, folder: &Path) -> Result<Self> {
        let place = catalogue.locate(Path::new(SHEET));
        let fail = |reason: String| Error::Input {
            path: place.path(),
            reason,
        };
        let bytes = read(catalogue, Path::new(SHEET))?;
        let mut sheet: Self = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
        if sheet.columns == 0 || sheet.tiles.is_empty() {
            return Err(fail("columns and tiles must not be 0".into()));
        }
        for tile in &mut sheet.tiles {
            let files = match &mut tile.content {
                Content::Picture(file) => vec![file],
                Content::Request(request) => {
                    // Networks stay for the next tile.
                    request.memory = request.memory.or(Some(MemoryMode::Fast));
                    let prompts = request.image_prompts.iter_mut().flatten();
                    prompts.flat_map(|prompt| &mut prompt.pictures).collect()
                }
            };
            for file in files {
                *file = laid_out(catalogue, file, folder)?;
            }
        }
        Ok(sheet)
    }
}

/// A picture beside the sheet, as a file in `folder`.
fn laid_out(catalogue: &Catalogue, file: &Path, folder: &Path) -> Result<PathBuf> {
    let name = file.file_name().ok_or_else(|| Error::Input {
        path: catalogue.locate(Path::new(SHEET)).path(),
        reason: format!("`{}` is no picture's name", file.display()),
    })?;
    let target = folder.join(name);
    let bytes = read(catalogue, &Path::new(SHEET).with_file_name(name))?;
    std::fs::write(&target, bytes).map_err(|source| Error::Output {
        path: target.clone(),
        source,
    })?;
    Ok(target)
}

fn read(catalogue: &Catalogue, file: &Path) -> Result<Vec<u8>> {
    let file = catalogue.locate(file);
    let fault = |reason| Error::Input {
        path: file.path(),
        reason,
    };
    let remedy = "the demo's sheet belongs to the built-in catalogue: --models built-in";
    let opened = file.open(remedy, fault)?;
    let bytes = opened.read(MAX_BYTES).map_err(|e| fault(e.to_string()))?;
    Ok(bytes.into_owned())
}

/// Tiles in rows, captions below them.
fn drawn(tiles: &[(RgbImage, &str)], columns: u32) -> RgbImage {
    let height = TILE + GAP + LINES as u32 * LEADING;
    let rows = (tiles.len() as u32).div_ceil(columns);
    let (width, whole) = (GAP + columns * (TILE + GAP), GAP + rows * (height + GAP));
    let mut sheet = RgbImage::from_pixel(width, whole, PAPER);
    for (i, (picture, caption)) in (0..).zip(tiles) {
        let x = GAP + i % columns * (TILE + GAP);
        let y = GAP + i / columns * (height + GAP);
        let fitted = resize(picture, fit(picture), Filter::Bicubic);
        let (left, top) = ((TILE - fitted.width()) / 2, (TILE - fitted.height()) / 2);
        imageops::replace(&mut sheet, &fitted, i64::from(x + left), i64::from(y + top));
        let lines = wrapped(caption, (TILE / LETTER) as usize);
        for (line, text) in (0..).zip(lines.iter().take(LINES)) {
            write(
                &mut sheet,
                (x, y + TILE + GAP / 2 + line * LEADING),
                text,
                INK,
            );
        }
    }
    sheet
}

/// The largest size of a picture that fits into a tile.
fn fit(picture: &RgbImage) -> (usize, usize) {
    let (width, height) = picture.dimensions();
    let long = width.max(height).max(1);
    let side = |side: u32| (u64::from(side) * u64::from(TILE) / u64::from(long)).max(1) as usize;
    (side(width), side(height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_stand_in_rows_with_captions_below() {
        let red = RgbImage::from_pixel(64, 32, Rgb([255, 0, 0]));
        let tiles = vec![(red, "some words"); 3];
        let sheet = drawn(&tiles, 2);
        let height = TILE + GAP + LINES as u32 * LEADING;
        assert_eq!(
            sheet.dimensions(),
            (GAP + 2 * (TILE + GAP), GAP + 2 * (height + GAP))
        );
        let at = |x, y| *sheet.get_pixel(x, y);
        assert_eq!(at(GAP + TILE / 2, GAP + TILE / 2), Rgb([255, 0, 0]));
        assert_eq!(at(GAP + TILE / 2, GAP + 4), PAPER);
        let caption = (GAP..GAP + TILE).any(|x| at(x, GAP + TILE + GAP / 2 + 3) == INK);
        assert!(caption);
    }

    #[test]
    fn what_a_sheet_says_is_checked() {
        let parse = |text: &str| serde_json::from_str::<Sheet>(text);
        let tile = r#"{"caption": "x", "request": {"prompt": "y", "steps": 2}}"#;
        assert!(parse(&format!(r#"{{"columns": 2, "tiles": [{tile}]}}"#)).is_ok());
        let picture = r#"{"caption": "x", "picture": "a.png"}"#;
        assert!(parse(&format!(r#"{{"columns": 2, "tiles": [{picture}]}}"#)).is_ok());
        assert!(parse(r#"{"columns": 2, "tiles": [{"caption": "x"}]}"#).is_err());
    }
}
