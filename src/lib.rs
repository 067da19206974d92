//! SDXL inference on ONNX Runtime.
//!
//! Modules stand in the order of the data flow; `ARCHITECTURE.md` says who may import whom.

pub mod error;
pub mod tensor;

pub use error::{Error, Result};
