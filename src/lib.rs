//! SDXL inference on ONNX Runtime: keeps a face or a style from a few pictures and paints it anew.
//!
//! `ARCHITECTURE.md` says how the modules stand to each other and who may import whom.
//!
//! ```no_run
//! use tronie::{Control, Options, Pipeline, Request};
//!
//! # fn main() -> tronie::Result<()> {
//! let pipeline = Pipeline::open(Options::default())?;
//! let request = Request { prompt: "a portrait in oil".into(), model: Some("demo".into()), ..Request::default() };
//! let output = pipeline.generate(&request, &mut |_| Control::Continue)?;
//! assert_eq!(output.pictures.len(), 1);
//! # Ok(())
//! # }
//! ```

pub mod bench;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod conditioning;
pub mod error;
pub mod files;
pub mod graph;
pub mod hub;
pub mod image;
pub mod lora;
pub mod manifest;
pub mod memory;
pub mod model_file;
pub mod noise;
pub mod pipeline;
pub mod plan;
pub mod progress;
pub mod prompt;
pub mod provider;
pub mod request;
pub mod runtime;
pub mod schedule;
pub mod schedulers;
pub mod tensor;
pub mod text;
pub mod vae;
pub mod weights;

pub use error::{Error, Result};
pub use memory::MemoryMode;
pub use pipeline::{LatentHandoff, Options, Output, Pipeline};
pub use progress::{Cancel, Control, Event};
pub use provider::Provider;
pub use request::Request;
