//! Who is compared with whom: pairs of client and server processes that differ in their cgroup and their ports only.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::lab::{Exec, Lab, Node, Place, Pod, Proc};

use super::Options;
use super::wire::{Answer, Job, Listener};

/// One side of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Below the cgroup that the agent serves; the client connects to the clusterIP.
    Vipr,
    /// In a cgroup without programs; the client connects to the pod.
    Plain,
    /// As `Plain`: its ratio to that says what the machine makes of nothing.
    Control,
}

impl Side {
    pub(super) const ALL: [Self; 3] = [Self::Vipr, Self::Plain, Self::Control];

    /// First port of its server. The Service has the same ports.
    pub(super) fn base_port(self) -> u16 {
        match self {
            Self::Vipr => 7000,
            Self::Plain => 7100,
            Self::Control => 7200,
        }
    }
}

/// Where a comparison takes place.
pub(super) struct Ground {
    client: Pod,
    server: Pod,
    pub(super) vip: IpAddr,
    pub(super) server_address: IpAddr,
    plain_cgroup: PathBuf,
    cpus: [usize; 2],
}

impl Ground {
    pub(super) fn new(lab: &Lab, node: &Node, options: &Options) -> Result<Self> {
        let server = lab.pod(if options.remote { "far-server" } else { "server" });
        let vip = if options.ipv6 { "fd00:96::10" } else { "10.96.0.10" }.parse()?;
        let family = |address: &&IpAddr| address.is_ipv6() == options.ipv6;
        let server_address = *server.addresses().iter().find(family).context("no address of the family")?;
        let above = node.cgroup().parent().context("the node's cgroup has no parent")?;
        let &[client_cpu, server_cpu] = options.cpus.as_slice() else { bail!("--cpus takes two numbers") };
        Ok(Self {
            client: lab.pod("client"),
            server,
            vip,
            server_address,
            plain_cgroup: above.join("plain"),
            cpus: [client_cpu, server_cpu],
        })
    }

    /// Starts both processes of a side.
    pub(super) fn start(&self, side: Side) -> Result<Pair> {
        let [client_cpu, server_cpu] = self.cpus.map(|cpu| cpu.to_string());
        let address = self.server_address.to_string();
        let port = side.base_port().to_string();
        let server = ["server", "--cpu", &server_cpu, "--address", &address, "--port", &port];
        let mut server = Remote::start(&self.server, &self.cgroup(side, &self.server)?, &server)?;
        let ready = server.line()?;
        ensure!(ready == "ready\n", "the server says {ready:?}");
        let client = ["client", "--cpu", &client_cpu];
        let client = Remote::start(&self.client, &self.cgroup(side, &self.client)?, &client)?;
        Ok(Pair { side, client, _server: server })
    }

    /// Where the client of a side connects to for `listener`.
    pub(super) fn target(&self, side: Side, listener: Listener) -> SocketAddr {
        let address = if side == Side::Vipr { self.vip } else { self.server_address };
        SocketAddr::new(address, listener.port(side.base_port()))
    }

    /// The address of the server itself.
    pub(super) fn pod(&self, side: Side, listener: Listener) -> SocketAddr {
        SocketAddr::new(self.server_address, listener.port(side.base_port()))
    }

    fn cgroup(&self, side: Side, place: &Place) -> Result<PathBuf> {
        if side == Side::Vipr {
            return Ok(place.cgroup().to_path_buf());
        }
        let dir = self.plain_cgroup.join(place.name());
        fs::create_dir_all(&dir).with_context(|| format!("cannot create the cgroup {}", dir.display()))?;
        Ok(dir)
    }
}

/// A running client and its server.
pub(super) struct Pair {
    pub(super) side: Side,
    client: Remote,
    _server: Remote,
}

impl Pair {
    /// Has the client do something.
    pub(super) fn ask(&mut self, job: &Job) -> Result<Answer> {
        let mut text = serde_json::to_string(job)?;
        text.push('\n');
        self.client.stdin.write_all(text.as_bytes()).context("the client does not read")?;
        match serde_json::from_str(&self.client.line()?)? {
            Answer::Failed(reason) => bail!("{:?}, {job:?}: {reason}", self.side),
            answer @ (Answer::Ran { .. } | Answer::Timed { .. }) => Ok(answer),
        }
    }
}

/// A process of this very program in a pod.
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
