//! Vipr's one tool for people and CI: anyone can run each step of CI by the same name.
//!
//! This file only reads the command line and dispatches; each command is a module of its own. The commands share
//! [`workspace`] (paths), [`process`] (running other programs) and [`toolchain`] (finding the compilers and tools that
//! [`setup`] installs).

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod workspace;

mod process;

mod rings;

mod toolchain;

mod target;

mod plan;

mod setup;

mod build_ebpf;

mod build;

mod demo;

mod test;

mod kernels;

mod bench;

mod lint;

/// Vipr's build, test and maintenance commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find the tools that the other commands need, and install missing ones.
    Setup(setup::Args),
    /// Build the BPF object into target/ebpf/vipr.o.
    BuildEbpf(build_ebpf::Args),
    /// Build the BPF object, the agent, and the test tools.
    Build(build::Args),
    /// Try Vipr on this machine, without a cluster: nodes, pods and clients in network namespaces.
    Demo {
        /// Arguments for the demo; `cargo xtask demo -- --help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the tests.
    Test(test::Args),
    /// Run a benchmark: `east-west`, `north-south`, `packet` or `sync`.
    Bench {
        /// Name of the benchmark, and arguments for it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        args: Vec<OsString>,
    },
    /// Check formatting, lints, docs, manifests, licences, and that `unsafe` is only in the files meant for it.
    Lint(lint::Args),
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // The error is not returned from main: a backtrace of xtask would say nothing about the tool that failed.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Setup(args) => setup::run(&args),
        Command::BuildEbpf(args) => build_ebpf::run(&args),
        Command::Build(args) => build::run(&args),
        Command::Demo { args } => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench { args } => bench::run(&args),
        Command::Lint(args) => lint::run(&args),
    }
}
