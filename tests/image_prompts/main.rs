//! Image prompts: how they are asked for, what models have for them, where they count.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod models;
mod request;
mod scale;
