//! `proxy-agent`: the command line.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use proxy_agent::args::{Cli, Command, MonitorArgs, Pins, RunArgs};
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::config::{Config, state_file};
use proxy_agent::monitor::MonitorError;
use proxy_agent::{agent, edge, flows, inspect, monitor};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Status(args) => print(|out| inspect::status(&args, out)),
        Command::Services(args) => print(|out| inspect::services(&args, out)),
        Command::Backends(args) => print(|out| inspect::backends(&args, out)),
        Command::Flows(args) => print(|out| flows::print(&args, out)),
        Command::Monitor(args) => watch(&args),
        Command::Cleanup { pins } => cleanup(&pins),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes: this is what a crash-looping pod's last log line is.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let level = match args.verbosity {
        // kube's clients log every attempt; the API source says the same once.
        0..=3 => "info,kube_client=off,kube_runtime=off",
        4..=5 => "proxy_agent=debug,info",
        _ => "proxy_agent=trace,debug",
    };
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(level))?;
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();

    let config = Config::resolve(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { anyhow::Ok(agent::run(config, stop()?).await?) })
}

fn watch(args: &MonitorArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let result = runtime.block_on(async { anyhow::Ok(monitor::run(args, stop()?, &mut out).await) })?;
    match result {
        // The reader has seen enough (`| head`).
        Err(MonitorError::Inspect(inspect::InspectError::Write(error)))
            if error.kind() == std::io::ErrorKind::BrokenPipe =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Ready on SIGTERM or SIGINT.
fn stop() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn print(
    show: impl FnOnce(&mut std::io::StdoutLock<'static>) -> Result<(), inspect::InspectError>,
) -> anyhow::Result<()> {
    match show(&mut std::io::stdout().lock()) {
        // The reader has seen enough (`| head`).
        Err(inspect::InspectError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn cleanup(pins: &Pins) -> anyhow::Result<()> {
    let dir = PinDir::new(&pins.pin_dir);
    if !pins.pin_dir.exists() {
        return Ok(());
    }
    let lock = dir.lock()?;
    // Links go with their pins; filters have none.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(edge::remove_filters())?;
    dir.remove()?;
    drop(lock);
    let state = state_file(&pins.run_dir, &pins.pin_dir);
    if state.exists() {
        std::fs::remove_file(&state).with_context(|| state.display().to_string())?;
    }
    Ok(())
}
