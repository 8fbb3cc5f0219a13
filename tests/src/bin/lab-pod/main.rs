//! The program inside the lab's pods: servers that identify themselves, and clients that report the server they
//! reached.
//!
//! All calls block, on threads; every line of output is one JSON object of [`proxy_tests::lab::Line`].

mod connect;
mod hold;
mod http;
mod icmp;
mod redis;
mod serve;
mod sock;

use std::io::{self, Write as _};

use anyhow::Result;
use clap::{Parser, Subcommand};
use proxy_tests::lab::Line;

/// Servers and clients for pods of the lab.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer on given addresses, with a name and the addresses of both sides.
    Serve(serve::Args),
    /// Make connections one after the other and report each.
    Connect(connect::Args),
    /// Open one connection, then send each line of standard input and report its answer.
    Hold(hold::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Connect(args) => connect::run(&args),
        Command::Hold(args) => hold::run(&args),
    }
}

/// Prints one line.
fn print(line: &Line) -> Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}
