//! SDXL inference on ONNX Runtime.
//!
//! Modules stand in the order of the data flow; `ARCHITECTURE.md` says who may import whom.

pub mod error;
pub mod graph;
pub mod hub;
pub mod tensor;
pub mod weights;

pub use error::{Error, Result};
