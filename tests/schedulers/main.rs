//! Schedulers against diffusers, against exact solutions, and against what holds for all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    clippy::float_cmp,
    reason = "where numbers are compared without a margin, equality is meant"
)]

mod decisions;
mod golden;
#[path = "../support/golden_runs.rs"]
mod golden_runs;
#[path = "../support/oracle.rs"]
mod oracle;
mod properties;
#[path = "../support/runs.rs"]
mod runs;
