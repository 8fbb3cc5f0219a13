//! Rows that every kernel has to pass: checks of real programs, real sockets and real devices, each with its expected
//! result.
//!
//! The program runs as root, on any machine or as nearly the only program of a virtual one. It needs in PATH: `ip`,
//! `tc` and `wg` for devices, `nft`, and `bpftool`. It finds the agent and `lab-pod` as the lab does (`VIPR_AGENT`,
//! `VIPR_LAB_POD`, or beside this program). `VIPR_AGENT_BEFORE` names an agent of an earlier build whose pins ours
//! takes over.
//!
//! It prints one line for each row as the row ends: `row ID ok SECONDS WHAT`, `row ID FAILED SECONDS WHY`, or `row ID
//! lacks WHAT` if the kernel lacks something and the substitute was right. `insns PROGRAM COUNT` are verified
//! instructions. The last line is `rows: N passed, N failed`; lacking rows have passed.

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

/// Check every row on the running kernel.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Require the cgroup v2 hierarchy to be at /sys/fs/cgroup/unified, beside those of version 1.
    #[arg(long)]
    hybrid: bool,
    /// Leave out rows whose name contains this.
    #[arg(long)]
    without: Vec<String>,
    /// Print the names of the rows.
    #[arg(long)]
    list: bool,
    /// Run only rows whose name contains one of these.
    filters: Vec<String>,
}

/// Returns every row, in the order in which they run: attachment, then serving, and last the rows that end or begin
/// something.
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
    let named =
        |row: &Row| (cli.filters.is_empty() || is_one_of(row, &cli.filters)) && !is_one_of(row, &cli.without);
    // The first row starts the agent.
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
    // A missing program is a mistake of the caller, not a failed row.
    binary::lab_pod()?;
    binary::proxy_agent()?;
    Ok(if row::run_all(&rows, cli.hybrid) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_one_of(row: &Row, parts: &[String]) -> bool {
    parts.iter().any(|part| row.id.contains(part))
}
