//! The `tronie` command.

#[cfg(feature = "cli")]
fn main() -> std::process::ExitCode {
    tronie::cli::run()
}

#[cfg(not(feature = "cli"))]
fn main() -> std::process::ExitCode {
    eprintln!("error: this build has no command line; build with the feature `cli`");
    std::process::ExitCode::FAILURE
}
