//! The `tronie` command.
fn main() {}
