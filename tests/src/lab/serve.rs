//! Servers in places of the lab.

use std::fmt::Display;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::binary;
use super::lines::Lines;
use super::place::Place;
use super::wire::Line;

/// Servers to be started in a place: one process, any number of ports, on all addresses of the place.
#[derive(Debug)]
pub struct Serve {
    place: Place,
    name: String,
    listeners: Vec<String>,
}

impl Serve {
    pub(super) fn new(place: &Place) -> Self {
        Self { place: place.clone(), name: place.name().to_owned(), listeners: Vec::new() }
    }

    /// Answers with `name` instead of the name of the place.
    #[must_use]
    pub fn name(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// Adds a TCP server that greets with its name and both addresses, then echoes lines.
    #[must_use]
    pub fn tcp(self, port: u16) -> Self {
        self.everywhere("tcp", port)
    }

    /// Adds a one-to-one SCTP server with the protocol of [`Serve::tcp`].
    #[must_use]
    pub fn sctp(self, port: u16) -> Self {
        self.everywhere("sctp", port)
    }

    /// Adds an HTTP/1.1 server that answers "You've hit NAME".
    #[must_use]
    pub fn http(self, port: u16) -> Self {
        self.everywhere("http", port)
    }

    /// Adds a UDP server that answers with its name, both addresses and the payload.
    #[must_use]
    pub fn udp(self, port: u16) -> Self {
        self.everywhere("udp", port)
    }

    /// Adds a TCP server that sends back every byte, without a greeting.
    #[must_use]
    pub fn echo(self, port: u16) -> Self {
        self.everywhere("echo", port)
    }

    /// Adds a TCP server that reads and discards.
    #[must_use]
    pub fn sink(self, port: u16) -> Self {
        self.everywhere("sink", port)
    }

    /// Adds a UDP server that sends back every datagram unchanged.
    #[must_use]
    pub fn udp_echo(self, port: u16) -> Self {
        self.everywhere("udp-echo", port)
    }

    /// Adds a server of `kind` (a word of `lab-pod serve --help`) on one address only, which may also be a wildcard.
    #[must_use]
    pub fn at(mut self, kind: &str, address: impl Display) -> Self {
        self.listeners.push(format!("{kind}={address}"));
        self
    }

    fn everywhere(mut self, kind: &str, port: u16) -> Self {
        self.listeners
            .extend(self.place.addresses().iter().map(|&ip| format!("{kind}={}", SocketAddr::new(ip, port))));
        self
    }

    /// Starts the process and returns when it listens on every port. It runs until [`Place::stop`], or the end of the
    /// lab.
    ///
    /// # Errors
    /// If a port is not available (the process prints the reason on standard error).
    pub fn start(self) -> Result<()> {
        let what = format!("{} serving {}", self.name, self.listeners.join(" "));
        ensure!(!self.listeners.is_empty(), "{what}: no ports given");
        let mut command = self.place.command(binary::lab_pod()?);
        command.args(["serve", "--name", &self.name]).args(&self.listeners);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let lines = Lines::of(process.take_stdout()?);
        match lines.next(Duration::from_secs(10)).with_context(|| what.clone())? {
            Line::Ready => {}
            line @ (Line::Attempt(_) | Line::Summary(_)) => bail!("{what}: unexpected {line:?}"),
        }
        self.place.keep(process);
        Ok(())
    }
}
