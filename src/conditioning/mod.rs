//! What a UNet is told besides the latents, one file per model family.

mod sdxl;

pub use sdxl::{Encoded, Prompts, Reading, Told, micro_conditioning};
