//! Files from the hub, against servers of this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cache;
#[path = "../support/hub_cache.rs"]
mod hub_cache;
#[path = "../support/hub_server.rs"]
mod hub_server;
mod refused;
mod transfer;
