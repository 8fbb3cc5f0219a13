//! A client process and its server process, each in a place of the lab.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::lab::{Exec, Place, Proc};

use super::wire::{Answer, Job};

/// Place, cgroup and CPU of a process.
pub(crate) struct Spot<'a> {
    pub(crate) place: &'a Place,
    /// Cgroup of the process, usually the place's own.
    pub(crate) cgroup: PathBuf,
    pub(crate) cpu: usize,
}

impl<'a> Spot<'a> {
    /// Returns a spot in the place's own cgroup.
    pub(crate) fn new(place: &'a Place, cpu: usize) -> Self {
        Self { place, cgroup: place.cgroup().to_path_buf(), cpu }
    }
}

/// A running client and its server.
pub(crate) struct Pair {
    /// Name of the pair, for error messages.
    name: String,
    client: Remote,
    _server: Remote,
}

impl Pair {
    /// Starts both processes; the server listens on `address`, on one port for each listener from `base_port` on.
    ///
    /// # Errors
    /// If a process cannot be started or a port is not available.
    pub(crate) fn start(
        name: String,
        client: &Spot<'_>,
        server: &Spot<'_>,
        address: IpAddr,
        base_port: u16,
    ) -> Result<Self> {
        let [client_cpu, server_cpu] = [client.cpu, server.cpu].map(|cpu| cpu.to_string());
        let (address, port) = (address.to_string(), base_port.to_string());
        let args = ["server", "--cpu", &server_cpu, "--address", &address, "--port", &port];
        let mut server = Remote::start(server.place, &server.cgroup, &args)?;
        let ready = server.line()?;
        ensure!(ready == "ready\n", "{name}: the server says {ready:?}");
        let client = Remote::start(client.place, &client.cgroup, &["client", "--cpu", &client_cpu])?;
        Ok(Self { name, client, _server: server })
    }

    /// Sends the client a job and returns its answer.
    ///
    /// # Errors
    /// If the client fails at the job, or has ended.
    pub(crate) fn ask(&mut self, job: &Job) -> Result<Answer> {
        let mut text = serde_json::to_string(job)?;
        text.push('\n');
        self.client.stdin.write_all(text.as_bytes()).context("the client does not read")?;
        match serde_json::from_str(&self.client.line()?)? {
            Answer::Failed(reason) => bail!("{}, {job:?}: {reason}", self.name),
            answer @ (Answer::Ran { .. } | Answer::Timed { .. }) => Ok(answer),
        }
    }
}

/// A process of this same program in a place.
struct Remote {
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    _process: Proc,
}

impl Remote {
    fn start(place: &Place, cgroup: &Path, args: &[&str]) -> Result<Self> {
        let program = std::env::current_exe().context("cannot tell the path of this executable")?;
        let mut command = Exec::new(place.net(), cgroup, program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let stdin = process.take_stdin()?;
        let stdout = BufReader::new(process.take_stdout()?);
        Ok(Self { stdin, stdout, _process: process })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(!line.is_empty(), "a process of the benchmark ended early; see its standard error");
        Ok(line)
    }
}
