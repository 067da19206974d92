//! SDXL inference on ONNX Runtime.
//!
//! Modules stand in the order of the data flow; `ARCHITECTURE.md` says who may import whom.

pub mod error;
pub mod noise;
pub mod schedule;
pub mod schedulers;
pub mod tensor;

pub use error::{Error, Result};
