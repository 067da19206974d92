//! The `tronie` executable from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bad_input;
mod broken_model;
mod resume;
mod workshop;
