//! LoRAs: what they make of weights, how they are named in requests, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fuzzed;
mod merged;
mod refused;
mod request;
#[path = "../support/safetensors_file.rs"]
mod safetensors_file;
mod types;
