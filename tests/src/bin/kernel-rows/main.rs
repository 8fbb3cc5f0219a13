//! What every kernel has to show: rows of real programs, real sockets and real devices, each with its right value.
//!
//! Runs as root, on any machine or as nearly the only program of a virtual one, and needs in PATH: `ip`, `tc` and `wg` for
//! devices, `nft`, and `bpftool`. The agent and `lab-pod` are found as by the lab (`VIPR_AGENT`, `VIPR_LAB_POD`, or beside this
//! program); an agent of an earlier build, whose pins ours takes over, is named by `VIPR_AGENT_BEFORE`.
//!
//! One line for each row as it ends: `row ID ok SECONDS WHAT`, `row ID FAILED SECONDS WHY`, or `row ID lacks WHAT` where the
//! kernel lacks something and what is done instead was right. `insns PROGRAM COUNT` are verified instructions.
//! The last line is `rows: N passed, N failed`; lacking rows have passed.

mod attached;
mod checks;
mod devices;
mod insns;
mod kernel;
mod large;
mod lifetime;
mod monitor;
mod moving;
mod neighbours;
mod objects;
mod outside;
mod refusals;
mod row;
mod sctp;
mod sockets;
mod sys;
mod tools;
mod tunnel;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use proxy_tests::lab::binary;

use row::Row;

/// Checks every row on the running kernel.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// The cgroup v2 hierarchy has to be the one at /sys/fs/cgroup/unified, beside those of version 1.
    #[arg(long)]
    hybrid: bool,
    /// Not rows whose name has this in it.
    #[arg(long)]
    without: Vec<String>,
    /// Prints the names of the rows.
    #[arg(long)]
    list: bool,
    /// Only rows whose name has one of these in it.
    filters: Vec<String>,
}

/// Every row, in the order in which they run: what is attached, what is served, and last what ends or begins.
fn rows() -> Vec<Row> {
    [
        attached::ROWS,
        sockets::ROWS,
        refusals::ROWS,
        outside::ROWS,
        sctp::ROWS,
        large::ROWS,
        devices::ROWS,
        moving::ROWS,
        neighbours::ROWS,
        monitor::ROWS,
        tools::ROWS,
        lifetime::ROWS,
    ]
    .concat()
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let is_one_of = |row: &Row, parts: &[String]| parts.iter().any(|part| row.id.contains(part));
    let named =
        |row: &Row| (cli.filters.is_empty() || is_one_of(row, &cli.filters)) && !is_one_of(row, &cli.without);
    // The first one starts the agent.
    let rows: Vec<Row> = rows()
        .into_iter()
        .enumerate()
        .filter(|(at, row)| *at == 0 || named(row))
        .map(|(_, row)| row)
        .collect();
    if cli.list {
        rows.iter().for_each(|row| row::say(row.id));
        return Ok(ExitCode::SUCCESS);
    }
    // A program that is missing is a mistake in how this one was started, not a row.
    binary::lab_pod()?;
    binary::proxy_agent()?;
    Ok(if row::run_all(&rows, cli.hybrid) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
