//! Weights: what a file holds, what a graph is given of it, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod components;
mod malformed;
mod narrow;
#[path = "../support/safetensors_file.rs"]
mod safetensors_file;
mod well_formed;
