//! The `tronie` executable from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bad_input;
mod bench;
mod broken_model;
mod cache;
#[cfg(feature = "demo")]
mod demo;
mod demo_quality;
#[path = "../support/expansions.rs"]
mod expansions;
mod from_hub;
#[path = "../support/hub_server.rs"]
mod hub_server;
mod image_prompts;
#[cfg(feature = "demo")]
mod installed;
mod loras;
mod memory;
mod prompts;
mod quality;
mod resume;
#[path = "../support/safetensors_file.rs"]
mod safetensors_file;
mod schedulers;
mod workshop;
