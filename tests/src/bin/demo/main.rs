//! A tour of Vipr on one machine, for people who see it for the first time: `cargo xtask demo`.
//!
//! Nodes and pods are network namespaces with real servers and clients in them. The agents are the real ones, on the
//! manifests of `examples/`. Every statement is also checked: the exit code says whether all of them were true.

mod acts;
mod keep;
mod outside;
mod stage;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use clap::Parser;
use proxy_tests::scenarios::World;

use stage::Stage;

/// Show Vipr at work on the Services in examples/, in about half a minute, and clean up.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo", disable_version_flag = true)]
struct Cli {
    /// Leave everything running after the tour and print commands to try, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

/// Set by Ctrl-C and SIGTERM, after which the demo cleans up and ends.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut stage = Stage::new(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    let result = watch_signals().and_then(|()| run(&cli, &mut stage));
    // At this point the lab is cleaned up.
    match result {
        Ok(true) => {}
        _ if interrupted() => {
            stage.line("\ninterrupted; everything is cleaned up");
            return ExitCode::from(130);
        }
        Ok(false) => {}
        Err(error) => stage.unexpected(&format!("{error:#}")),
    }
    stage.finish()
}

/// Runs the tour; returns whether it came to its end.
fn run(cli: &Cli, stage: &mut Stage) -> Result<bool> {
    let mut world = acts::open(stage)?;
    for act in acts::ALL {
        if interrupted() {
            return Ok(false);
        }
        act(&mut world, stage)?;
    }
    if cli.keep {
        keep::running(&world, stage)?;
    }
    Ok(true)
}

/// Returns whether Ctrl-C or SIGTERM asked the demo to end.
fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

fn watch_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate()];
        let [interrupt, terminate] = kinds.map(signal);
        (interrupt.context("SIGINT")?, terminate.context("SIGTERM")?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// One part of the tour.
type Act = fn(&mut World, &mut Stage) -> Result<()>;
