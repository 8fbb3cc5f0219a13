//! kube-proxy's file and flags against kube-proxy's interpretation of them, and against the documentation.

mod docs;
mod file;
mod flags;
mod validate;

use std::ffi::OsString;
use std::path::PathBuf;

use super::duration::GoDuration;
use super::*;
use crate::config::args::{Cli, Command, RunArgs};

/// Parses the flags of `run` from a command line.
fn run_args(args: &[&str]) -> RunArgs {
    match command(args) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn command(args: &[&str]) -> Result<Command, clap::Error> {
    let line = std::iter::once("proxy-agent").chain(args.iter().copied()).map(OsString::from);
    Cli::from_command_line(line).map(|cli| cli.command)
}

/// Returns a configuration file with these fields after `apiVersion` and `kind`.
fn file_with(fields: &str) -> ConfigFile {
    let content =
        format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}");
    ConfigFile { path: PathBuf::from("config.conf"), content: content.into_bytes() }
}

/// Returns the configuration of a file with these fields, with defaults.
fn effective(fields: &str) -> KubeProxyConfiguration {
    let (configuration, ignored) = file_with(fields).decode().unwrap();
    assert_eq!(ignored, [""; 0], "{fields}");
    configuration.with_defaults()
}
