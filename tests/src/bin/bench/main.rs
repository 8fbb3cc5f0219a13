//! Benchmarks: the cost of Vipr for a connection inside the cluster (`east-west`) and from outside (`north-south`), the
//! cost of its programs for a packet (`packet`), and the speed at which the agent follows the API (`sync`).
//!
//! Each builds a lab of its own, runs the real agent in it, and prints one table or one JSON document on standard
//! output and its progress on standard error. `docs/performance.md` explains the figures.

mod cluster;
mod cpu;
mod east_west;
mod machine;
mod north_south;
mod objects;
mod outside;
mod packet;
mod programs;
mod report;
mod stats;
mod sync;
mod sys;
mod traffic;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use report::Report;

/// Benchmarks of Vipr.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare connections and datagrams through a clusterIP with those to the pod's own address without any programs.
    EastWest {
        #[command(flatten)]
        options: east_west::Options,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Compare connections of a client outside through a nodePort with those to the pod's own address without any
    /// programs.
    NorthSouth {
        #[command(flatten)]
        options: north_south::Options,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Measure the time that the programs of the packet edge take for a packet.
    Packet {
        #[command(flatten)]
        options: packet::Options,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Measure the time and memory that the agent needs to program the objects of the API server.
    Sync {
        #[command(flatten)]
        options: sync::Options,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Run the client side of traffic; started by the benchmarks.
    #[command(hide = true)]
    Client(traffic::ClientArgs),
    /// Run the server side of traffic; started by the benchmarks.
    #[command(hide = true)]
    Server(traffic::ServerArgs),
}

#[derive(Clone, Copy, Debug, Args)]
struct OutputArgs {
    /// Format of the figures.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Exit with status 1 if a figure misses its bar.
    #[arg(long)]
    enforce: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table for people.
    Table,
    /// JSON for programs; docs/performance.md describes it.
    Json,
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        progress(format_args!("error: {error:#}"));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let (report, output) = match Cli::parse().command {
        Command::EastWest { options, output } => (first(|| east_west::run(&options))?, output),
        Command::NorthSouth { options, output } => (first(|| north_south::run(&options))?, output),
        Command::Packet { options, output } => (first(|| packet::run(&options))?, output),
        Command::Sync { options, output } => (first(|| sync::run(&options))?, output),
        Command::Client(args) => return traffic::client(&args).map(|()| ExitCode::SUCCESS),
        Command::Server(args) => return traffic::server(&args).map(|()| ExitCode::SUCCESS),
    };
    print(&report, output.output)?;
    Ok(if output.enforce && !report.all_met() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs a benchmark with priority over the machine's other processes.
fn first(run: impl FnOnce() -> Result<Report>) -> Result<Report> {
    let _priority = cpu::Priority::raise()?;
    run()
}

fn print(report: &Report, output: Output) -> Result<()> {
    let text = match output {
        Output::Table => report.table(),
        Output::Json => serde_json::to_string_pretty(report)? + "\n",
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Prints a line about the progress on standard error.
fn progress(text: std::fmt::Arguments<'_>) {
    // A closed standard error does not stop the benchmark.
    let _ = writeln!(std::io::stderr(), "{text}");
}
