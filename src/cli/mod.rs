//! The command line: parses flags into a [`Request`](crate::request::Request), shows progress, sets the exit status.

mod args;
mod bars;
mod bench;
mod cache;
mod chart;
mod console;
#[cfg(feature = "demo")]
mod demo;
mod embed;
mod generate;
mod lettering;
mod lora;
mod report;
mod schedulers;
mod zip;

use std::process::ExitCode;

use clap::Parser as _;

use crate::error::Result;
use args::{Cli, Command};

/// Runs the command line of this process.
///
/// Exit status: 0 done, otherwise [`crate::Error::code`]; 2 for flags that cannot be parsed.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(status) => status,
        Err(error) => {
            console::say(&format!("error: {error}"));
            ExitCode::from(error.code())
        }
    }
}

fn dispatch(cli: &Cli) -> Result<ExitCode> {
    let done = match &cli.command {
        Command::Generate(args) => generate::generate(args),
        Command::Embed(args) => embed::embed(args),
        Command::Lora(args) => lora::lora(args),
        Command::Models(args) => report::models(args),
        Command::Schedulers(args) => schedulers::schedulers(args),
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::demo(args),
        Command::Inspect(args) => report::inspect(args),
        Command::Doctor(args) => report::doctor(args),
        Command::Cache(args) => cache::cache(args),
        // Every configuration may have failed, each for its own reason.
        Command::Bench(args) => return bench::bench(args),
        Command::BenchJob(args) => bench::job(args),
    };
    done.map(|()| ExitCode::SUCCESS)
}
