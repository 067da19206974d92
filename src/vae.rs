//! Latents to pictures.
//!
//! Twin: the decoding end of `StableDiffusionXLPipeline.__call__`, and `AutoencoderKL.tiled_decode`.

use image::RgbImage;
use ndarray::{Array4, ArrayView4, Axis, Ix4, Zip, concatenate, s};

use crate::error::{Error, Result};
use crate::image::to_rgb;
use crate::manifest::VaeFacts;
use crate::plan::names;
use crate::request::VaeTiling;
use crate::runtime::Session;
use crate::tensor::{Latents, Tensor, all_finite};

/// Pictures of more px are decoded in tiles unless told otherwise: SDXL's decoder needs about 3 GiB for each million px.
const TILE_ABOVE: usize = 1536 * 1536;
/// Share of a tile that overlaps its neighbour (`tile_overlap_factor`).
const OVERLAP: f64 = 0.25;

/// The geometry of tiled decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiles {
    /// Latents along a tile's side.
    latent: usize,
    /// Latents from one tile to the next.
    stride: usize,
    /// Pixels over which neighbours are blended.
    blend: usize,
    /// Pixels of a tile that are kept.
    keep: usize,
}

/// Decodes `latents` `[batch, channels, h, w]` (in the units the UNet works in), one picture after the other.
///
/// # Errors
/// Those of [`Session::run`]; [`Error::NonFinite`] and [`Error::Black`] when the decoder or checkpoint is broken.
pub fn decode(
    session: &mut Session,
    facts: &VaeFacts,
    latents: &Latents,
    tiling: VaeTiling,
) -> Result<Vec<RgbImage>> {
    latents
        .axis_chunks_iter(Axis(0), 1)
        .map(|one| picture(session, facts, &one, tiling))
        .collect()
}

fn picture(
    session: &mut Session,
    facts: &VaeFacts,
    latents: &ArrayView4<'_, f32>,
    tiling: VaeTiling,
) -> Result<RgbImage> {
    let latents = denormalize(latents, facts);
    let (_, _, h, w) = latents.dim();
    let tiles = Tiles::new(facts, tiling);
    let larger_than_tile = h.max(w) > tiles.latent;
    let tiled = match tiling {
        VaeTiling::Off => false,
        VaeTiling::On | VaeTiling::Tile(_) => larger_than_tile,
        VaeTiling::Auto => larger_than_tile && h * w * facts.scale * facts.scale > TILE_ABOVE,
    };
    let pixels = if tiled {
        decode_tiles(session, &latents, tiles)?
    } else {
        decode_whole(session, latents)?
    };
    if pixels.shape() != [1, 3, h * facts.scale, w * facts.scale] {
        return Err(Error::Contract {
            graph: names::VAE_DECODER.into(),
            tensor: names::SAMPLE.into(),
            expected: format!("[1, 3, {}, {}]", h * facts.scale, w * facts.scale),
            actual: format!(
                "{:?}; vae.scale in the catalogue may be wrong",
                pixels.shape()
            ),
        });
    }
    if !all_finite(&pixels) {
        return Err(Error::NonFinite {
            component: names::VAE_DECODER.into(),
            step: None,
            remedy: "the VAE overflows in low precision; use a checkpoint with an f32 VAE, or the fp16-fix VAE",
        });
    }
    let rgb = to_rgb(&pixels.index_axis(Axis(0), 0));
    if rgb.as_raw().iter().all(|level| *level == 0) {
        return Err(Error::Black {
            component: names::VAE_DECODER.into(),
        });
    }
    Ok(rgb)
}

/// Undoes the scaling that gives latents unit variance.
fn denormalize(latents: &ArrayView4<'_, f32>, facts: &VaeFacts) -> Array4<f32> {
    let scaling = facts.scaling_factor as f32;
    let (Some(mean), Some(std)) = (&facts.latents_mean, &facts.latents_std) else {
        return latents.mapv(|x| x / scaling);
    };
    let mut scaled = latents.to_owned();
    for (c, mut channel) in scaled.axis_iter_mut(Axis(1)).enumerate() {
        let (mean, std) = (mean[c] as f32, std[c] as f32);
        channel.mapv_inplace(|x| x * std / scaling + mean);
    }
    scaled
}

fn decode_whole(session: &mut Session, latents: Array4<f32>) -> Result<Array4<f32>> {
    let pixels = session.run_for(
        &[(names::LATENT_SAMPLE, &Tensor::from(latents))],
        names::SAMPLE,
    )?;
    pixels
        .into_dimensionality::<Ix4>()
        .map_err(|e| Error::Contract {
            graph: names::VAE_DECODER.into(),
            tensor: names::SAMPLE.into(),
            expected: "[batch, 3, height, width]".into(),
            actual: e.to_string(),
        })
}

impl Tiles {
    fn new(facts: &VaeFacts, tiling: VaeTiling) -> Self {
        let side = match tiling {
            VaeTiling::Tile(px) => px,
            VaeTiling::Auto | VaeTiling::On | VaeTiling::Off => facts.sample_size,
        };

        // AutoencoderKL rounds each of these by itself, which leaves gaps where the sizes do not divide; in whole
        // latents, neighbours always meet. For sizes that divide by four, SDXL's among them, both are the same.
        let latent = (side / facts.scale).max(1);
        let stride = ((latent as f64 * (1.0 - OVERLAP)) as usize).max(1);
        Self {
            latent,
            stride,
            blend: (latent - stride) * facts.scale,
            keep: stride * facts.scale,
        }
    }
}

fn decode_tiles(session: &mut Session, latents: &Array4<f32>, tiles: Tiles) -> Result<Array4<f32>> {
    let (_, _, h, w) = latents.dim();
    let mut rows = Vec::new();
    let mut above: Vec<Array4<f32>> = Vec::new();
    for top in (0..h).step_by(tiles.stride) {
        let bottom = (top + tiles.latent).min(h);
        let mut row: Vec<Array4<f32>> = Vec::new();
        for left in (0..w).step_by(tiles.stride) {
            let right = (left + tiles.latent).min(w);
            let part = latents
                .slice(s![.., .., top..bottom, left..right])
                .to_owned();
            let mut tile = decode_whole(session, part)?;
            if let Some(upper) = above.get(row.len()) {
                blend(upper, &mut tile, Axis(2), tiles.blend);
            }
            if let Some(before) = row.last() {
                blend(before, &mut tile, Axis(3), tiles.blend);
            }
            row.push(tile);
        }
        let kept = row.iter().map(|tile| {
            let (_, _, height, width) = tile.dim();
            tile.slice(s![
                ..,
                ..,
                ..height.min(tiles.keep),
                ..width.min(tiles.keep)
            ])
        });
        rows.push(join(Axis(3), &kept.collect::<Vec<_>>())?);
        above = row;
    }
    let rows = rows.iter().map(|row| row.view()).collect::<Vec<_>>();
    join(Axis(2), &rows)
}

fn join(axis: Axis, parts: &[ArrayView4<'_, f32>]) -> Result<Array4<f32>> {
    concatenate(axis, parts).map_err(|e| Error::Contract {
        graph: names::VAE_DECODER.into(),
        tensor: names::SAMPLE.into(),
        expected: "tiles of one size".into(),
        actual: e.to_string(),
    })
}

/// Fades from the end of `before` into the start of `tile` along `axis`, linearly over `extent` px.
fn blend(before: &Array4<f32>, tile: &mut Array4<f32>, axis: Axis, extent: usize) {
    let length = before.len_of(axis);
    let extent = extent.min(length).min(tile.len_of(axis));
    for i in 0..extent {
        let share = i as f32 / extent as f32;
        let old = before.index_axis(axis, length - extent + i);
        let mut new: ndarray::ArrayViewMut3<'_, f32> = tile.index_axis_mut(axis, i);
        let old: ndarray::ArrayView3<'_, f32> = old;
        Zip::from(&mut new)
            .and(&old)
            .for_each(|n, &o| *n = o * (1.0 - share) + *n * share);
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;

    fn facts() -> VaeFacts {
        VaeFacts {
            scaling_factor: 0.13025,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            latent_channels: 4,
            scale: 8,
            sample_size: 1024,
            force_upcast: true,
        }
    }

    #[test]
    fn tiles_have_the_references_geometry() {
        // AutoencoderKL: tile_latent_min_size 128, overlap_size 96, blend_extent 256, row_limit 768.
        assert_eq!(
            Tiles::new(&facts(), VaeTiling::Auto),
            Tiles {
                latent: 128,
                stride: 96,
                blend: 256,
                keep: 768
            }
        );
        // The same with tile_latent_min_size 64 and tile_sample_min_size 512.
        assert_eq!(
            Tiles::new(&facts(), VaeTiling::Tile(512)),
            Tiles {
                latent: 64,
                stride: 48,
                blend: 128,
                keep: 384
            }
        );
    }

    #[test]
    fn tiles_meet_for_every_size() {
        for (latent, scale) in [(5, 8), (1, 8), (7, 2), (30, 4)] {
            let sample_size = latent * scale;
            let facts = VaeFacts {
                scale,
                sample_size,
                ..facts()
            };
            let tiles = Tiles::new(&facts, VaeTiling::On);
            assert_eq!(tiles.keep, tiles.stride * scale);
            assert!(tiles.blend + tiles.keep == sample_size);
        }
    }

    #[test]
    fn blending_goes_from_the_old_tile_to_the_new() {
        let before = Array4::from_elem((1, 3, 4, 8), 1.0);
        let mut tile = Array4::zeros((1, 3, 4, 8));
        blend(&before, &mut tile, Axis(3), 4);
        let row: Array3<f32> = tile.index_axis(Axis(0), 0).to_owned();
        assert_eq!(
            row.slice(s![0, 0, ..5]).to_vec(),
            [1.0, 0.75, 0.5, 0.25, 0.0]
        );
    }
}
