//! Running the agent in a node.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::binary;
use super::exec::Proc;
use super::place::{Node, Place};

/// Addresses of the agents' servers: every node has a loopback of its own, so that the usual addresses do not collide.
const HEALTH: &str = "127.0.0.1:10256";
const METRICS: &str = "127.0.0.1:10249";
/// Number of log lines that a dropped agent prints.
const SHOWN_LINES: usize = 25;

/// A `proxy-agent run` of one node, which can be started, killed and started again. Dropping it kills the agent and
/// prints its log to standard error, which test runners show for failed tests only.
#[derive(Debug)]
pub struct Agent {
    host: Place,
    program: PathBuf,
    pin_dir: String,
    run_dir: String,
    flags: BTreeMap<String, String>,
    env: BTreeMap<String, String>,
    subcommand: Option<&'static str>,
    log: File,
    show_log: bool,
    running: Option<Proc>,
}

impl Agent {
    pub(super) fn new(node: &Node) -> Result<Self> {
        let program = binary::proxy_agent()?.to_path_buf();
        let [pin_dir, run_dir] = [node.pin_dir(), node.run_dir()].map(|dir| dir.display().to_string());
        let flags = [
            ("hostname-override", node.name()),
            ("cgroup-path", &node.cgroup().display().to_string()),
            ("pin-dir", &pin_dir),
            ("run-dir", &run_dir),
            ("cluster-cidr", node.cluster_cidr()),
            ("healthz-bind-address", HEALTH),
            ("metrics-bind-address", METRICS),
        ];
        let flags = flags.map(|(flag, value)| (flag.to_owned(), value.to_owned())).into();
        // Without a name, so that the file never stays behind.
        let log = tempfile::tempfile().context("no temporary file for the agent's log")?;
        let host = node.host().clone();
        Ok(Self {
            host,
            program,
            pin_dir,
            run_dir,
            flags,
            env: BTreeMap::new(),
            subcommand: Some("run"),
            log,
            show_log: true,
            running: None,
        })
    }

    /// Sets `--flag value`, also in place of a default.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: impl ToString) -> Self {
        self.flags.insert(flag.to_owned(), value.to_string());
        self
    }

    /// Runs another program than the agent that was built with the lab, for example an earlier one.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// Leaves out a flag that is given by default.
    #[must_use]
    pub fn without(mut self, flag: &str) -> Self {
        self.flags.remove(flag);
        self
    }

    /// Reads the objects in a directory.
    #[must_use]
    pub fn manifests(self, dir: &Path) -> Self {
        self.flag("manifests", dir.display())
    }

    /// Reads the objects of an API server.
    #[must_use]
    pub fn kubeconfig(self, file: &Path) -> Self {
        self.flag("kubeconfig", file.display())
    }

    /// Leaves out the word `run`: flags only, as in a command line of kube-proxy.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.subcommand = None;
        self
    }

    /// Sets an environment variable, such as `RUST_LOG`.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Does not print the log when dropped.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.show_log = false;
        self
    }

    /// Starts the process. Its output is appended to the log.
    ///
    /// # Errors
    /// If the agent is running already, or cannot be run.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "the agent runs already");
        let mut command = self.host.command(&self.program);
        command.args(self.subcommand);
        for (flag, value) in &self.flags {
            command.arg(format!("--{flag}={value}"));
        }
        for (key, value) in &self.env {
            command.env(key, value);
        }
        let log = || self.log.try_clone().context("the agent's log");
        command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        self.running = Some(command.spawn()?);
        Ok(())
    }

    /// Waits until `/readyz` returns 200.
    ///
    /// # Errors
    /// With the log, if that takes longer than `patience` or the process ends.
    pub fn wait_ready(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let process = self.running.as_mut().context("the agent is not started")?;
            if let Some(status) = process.ended()? {
                self.running = None;
                bail!("the agent ended ({status}) before it was ready; its log:\n{}", self.log());
            }
            let answer = self.get("/readyz");
            if matches!(answer, Ok((200, _))) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the agent is not ready after {patience:?} ({answer:?}); its log:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Does [`Agent::start`], then [`Agent::wait_ready`] for up to a minute.
    ///
    /// # Errors
    /// As [`Agent::start`] and [`Agent::wait_ready`].
    pub fn start_ready(&mut self) -> Result<()> {
        self.start()?;
        self.wait_ready(Duration::from_secs(60))
    }

    /// Kills the agent with SIGKILL.
    ///
    /// # Errors
    /// If the agent is not running.
    pub fn kill9(&mut self) -> Result<()> {
        self.running.take().context("the agent does not run")?.kill9();
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// If the agent is not running, or does not end within 10 seconds.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.running.take().context("the agent does not run")?.terminate(Duration::from_secs(10))
    }

    /// Waits until the agent ends by itself.
    ///
    /// # Errors
    /// If the agent is not running, or does not end within `patience`.
    pub fn wait_end(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.running.take().context("the agent does not run")?.wait(patience)
    }

    /// Returns the agent's process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.running.as_ref().map(Proc::id)
    }

    /// Fetches a path of the agent's health server; returns status code and body.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        self.http("healthz-bind-address", path)
    }

    /// Returns the agent's metrics, in the text format.
    ///
    /// # Errors
    /// If the server does not answer with metrics.
    pub fn metrics(&self) -> Result<String> {
        let (status, body) = self.http("metrics-bind-address", "/metrics")?;
        ensure!(status == 200, "/metrics: status {status}: {body}");
        Ok(body)
    }

    fn http(&self, flag: &str, path: &str) -> Result<(u16, String)> {
        let address: SocketAddr = self
            .flags
            .get(flag)
            .and_then(|value| value.parse().ok())
            .with_context(|| format!("--{flag} is not an address and port"))?;
        self.host.http_get(address, path)
    }

    /// Runs `proxy-agent SUBCOMMAND -o json` on this node's pins (the agent need not run) and returns its output.
    ///
    /// # Errors
    /// With its standard error if it fails, or if it does not print JSON.
    pub fn tool(&self, subcommand: &str, args: &[&str]) -> Result<Value> {
        let mut command = self.host.command(&self.program);
        let run_dir = self.flags.get("run-dir").unwrap_or(&self.run_dir);
        command.args([subcommand, "-o", "json", "--pin-dir", &self.pin_dir, "--run-dir", run_dir]);
        command.args(args);
        let text = command.text()?;
        serde_json::from_str(&text)
            .with_context(|| format!("proxy-agent {subcommand} printed no JSON: {text:?}"))
    }

    /// Returns the output of all runs, standard output and standard error.
    pub fn log(&self) -> String {
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        // Read without moving the offset, which the agent may be writing at.
        match self.log.read_exact_at(&mut bytes, 0) {
            Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("(the log cannot be read: {error})"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.running = None;
        if self.show_log {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let skipped = lines.len().saturating_sub(SHOWN_LINES);
            eprintln!("--- log of the agent on {}, without its first {skipped} lines", self.host.name());
            eprintln!("{}", lines[skipped..].join("\n"));
        }
    }
}
