//! `proxy-agent`: the command line. It is part of the library, because generic or asynchronous code is compiled again
//! for each crate that starts it: in a program of its own that would be most of the agent.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::bpf::notes::Notes;
use crate::bpf::pins::PinDir;
use crate::commands::explain::ExplainError;
use crate::commands::inspect::InspectError;
use crate::commands::monitor::MonitorError;
use crate::config::args::{Cli, Command, ExplainArgs, MonitorArgs, Pins, RunArgs, VerifyArgs};
use crate::config::kube_proxy::KubeProxyConfiguration;
use crate::config::{Config, Raw, state_file};
use crate::host::Host;
use crate::host::process;
use crate::{agent, devices};

pub(crate) mod cleanup;

pub(crate) mod explain;

pub(crate) mod flows;

pub(crate) mod inspect;

pub(crate) mod monitor;

pub(crate) mod table;

pub(crate) mod verify;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::from_command_line(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let result = match cli.command {
        Command::Run(args) => run(&args),
        Command::Status(_) | Command::Services(_) | Command::Backends(_) | Command::Flows(_) => {
            print(|out| write_maps(&cli.command, out))
        }
        Command::Monitor(args) => watch(&args),
        Command::Verify(args) => verify(&args),
        Command::Explain(args) => explain(&args),
        Command::Cleanup { pins } => cleanup(&pins),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "proxy-agent", &mut script);
            print(|out| out.write_all(&script).map_err(InspectError::Write))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with all causes, because it becomes the last log line of a crash-looping pod.
            let _ = writeln!(std::io::stderr(), "error: {}", in_one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Writes what a command line prints about the pinned maps: of `status`, `services`, `backends` or `flows`.
///
/// # Errors
///
/// The command line is wrong, or the maps cannot be read. Other commands write nothing.
pub fn show(line: impl IntoIterator<Item = OsString>, out: &mut impl Write) -> anyhow::Result<()> {
    Ok(write_maps(&Cli::from_command_line(line)?.command, out)?)
}

fn write_maps(command: &Command, out: &mut impl Write) -> Result<(), InspectError> {
    match command {
        Command::Status(args) => inspect::status(args, out),
        Command::Services(args) => inspect::services(args, out),
        Command::Backends(args) => inspect::backends(args, out),
        Command::Flows(args) => flows::print(args, out),
        Command::Run(_)
        | Command::Monitor(_)
        | Command::Verify(_)
        | Command::Explain(_)
        | Command::Cleanup { .. }
        | Command::Completion { .. } => Ok(()),
    }
}

/// Returns an error with its causes, except causes that the error itself ends with.
fn in_one_line(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).fold(error.to_string(), |text, cause| {
        if text.ends_with(&cause) { text } else { format!("{text}: {cause}") }
    })
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let flags = &args.kube_proxy;
    if flags.cleanup == Some(true) {
        return cleanup(&args.pins);
    }
    let raw = Raw::load(args)?;
    start_log(&raw.configuration)?;
    if let Some(path) = flags.write_config_to() {
        // The configuration need not be for this host.
        let config =
            Config::resolve(args, raw, &Host { name: "any".to_owned(), ipv6: true, ..Host::default() })?;
        for note in &config.notes {
            tracing::warn!("{note}");
        }
        std::fs::write(path, config.effective.to_yaml()?).with_context(|| path.display().to_string())?;
        tracing::info!(file = %path.display(), "configuration written");
        return Ok(());
    }
    let config = Config::resolve(args, raw, &Host::look(args.cgroup_path.as_deref())?)?;
    for note in &config.notes {
        tracing::warn!("{note}");
    }
    if flags.init_only == Some(true) {
        config.pins.create()?;
        devices::reserved_ports::keep(&Notes::of(&config.pins), None);
        return Ok(());
    }
    process::set_oom_score_adj(config.oom_score_adj);
    process::share_one_heap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { anyhow::Ok(agent::run(config, stop()?).await?) })
}

fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let raw = Raw::load(&args.run)?;
    let config = Config::resolve(&args.run, raw, &Host::look(args.run.cgroup_path.as_deref())?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let findings = runtime.block_on(verify::run(&config))?;
    print(|out| findings.print(args.output, out))?;
    let differences = findings.differences.len();
    anyhow::ensure!(differences == 0, "{differences} differences between what should be and the maps");
    Ok(())
}

fn explain(args: &ExplainArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let pod = runtime.block_on(explain::client_pod(args))?;
    match explain::print(args, pod.as_ref(), &mut std::io::stdout().lock()) {
        Err(ExplainError::Inspect(error)) => print(|_| Err(error)),
        other => Ok(other?),
    }
}

fn watch(args: &MonitorArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let result = runtime.block_on(async { anyhow::Ok(monitor::run(args, stop()?, &mut out).await) })?;
    match result {
        // The reader of the output has seen enough (`| head`).
        Err(MonitorError::Inspect(InspectError::Write(error)))
            if error.kind() == std::io::ErrorKind::BrokenPipe =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Returns a future that is ready on SIGTERM or SIGINT.
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

fn start_log(settings: &KubeProxyConfiguration) -> anyhow::Result<()> {
    let level = match settings.verbosity() {
        // kube's clients log every attempt; the API source says the same once.
        0..=3 => "info,kube_client=off",
        4..=5 => "proxy_agent=debug,info",
        _ => "proxy_agent=trace,debug",
    };
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(level))?;
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr);
    if settings.logs_json() {
        log.json().init()
    } else {
        log.init()
    }
    Ok(())
}

fn print(
    show: impl FnOnce(&mut std::io::StdoutLock<'static>) -> Result<(), InspectError>,
) -> anyhow::Result<()> {
    match show(&mut std::io::stdout().lock()) {
        // The reader of the output has seen enough (`| head`).
        Err(InspectError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn cleanup(pins: &Pins) -> anyhow::Result<()> {
    Ok(cleanup::run(&PinDir::new(&pins.pin_dir), &state_file(&pins.run_dir, &pins.pin_dir))?)
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn no_cause_is_told_twice() {
        let error =
            Err::<(), _>(anyhow!("no such file")).context("--config x: no such file").context("the agent");
        let error = error.unwrap_err();
        assert_eq!(in_one_line(&error), "the agent: --config x: no such file");
    }
}
