//! Clients in places of the lab.

use std::ffi::OsString;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::binary;
use super::exec::{Exec, Proc};
use super::lines::Lines;
use super::place::Place;
use super::wire::{Attempt, Proto};

/// Time that a client may need to start and to report, in addition to its own time limits.
const SLACK: Duration = Duration::from_secs(10);

/// Options that [`Connect`] and [`Hold`] share.
#[derive(Clone, Debug)]
struct Options {
    place: Place,
    target: String,
    proto: Proto,
    timeout: Duration,
    args: Vec<OsString>,
}

impl Options {
    fn new(place: &Place, target: String) -> Self {
        let timeout = Duration::from_secs(2);
        Self { place: place.clone(), target, proto: Proto::default(), timeout, args: Vec::new() }
    }

    fn push(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(Into::into));
    }

    fn command(&self, subcommand: &str) -> Result<Exec> {
        let mut command = self.place.command(binary::lab_pod()?);
        command.args([subcommand, &self.target, "--proto", self.proto.as_str()]);
        command.args(["--timeout-ms", &self.timeout.as_millis().to_string()]).args(&self.args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(command)
    }
}

/// Connections (or datagrams, or requests) to be made from a place, one after the other.
#[derive(Clone, Debug)]
pub struct Connect {
    options: Options,
    times: usize,
    pace: Duration,
}

/// The setters that clients of both kinds share.
macro_rules! common_options {
    () => {
        /// Sets the protocol; TCP by default.
        #[must_use]
        pub fn proto(mut self, proto: Proto) -> Self {
            self.options.proto = proto;
            self
        }

        /// Uses UDP by connect, send, recv.
        #[must_use]
        pub fn udp(self) -> Self {
            self.proto(Proto::Udp)
        }

        /// Uses UDP by sendto, recvfrom.
        #[must_use]
        pub fn udp_unconnected(self) -> Self {
            self.proto(Proto::UdpUnconnected)
        }

        /// Uses AF_INET6 sockets, with v4-mapped addresses for IPv4.
        #[must_use]
        pub fn v6_socket(mut self) -> Self {
            self.options.push(&["--v6-socket"]);
            self
        }

        /// Binds the socket first to `source`, an address or `address:port`.
        #[must_use]
        pub fn bind(mut self, source: impl ToString) -> Self {
            self.options.push(&["--bind", &source.to_string()]);
            self
        }

        /// Sets the time limit of each attempt; 2 seconds by default.
        #[must_use]
        pub fn timeout(mut self, timeout: Duration) -> Self {
            self.options.timeout = timeout;
            self
        }
    };
}

impl Connect {
    pub(super) fn new(place: &Place, target: String) -> Self {
        Self { options: Options::new(place, target), times: 1, pace: Duration::ZERO }
    }

    common_options!();

    /// Uses HTTP/1.1, one request per connection.
    #[must_use]
    pub fn http(self) -> Self {
        self.proto(Proto::Http)
    }

    /// Sets the number of attempts; 1 by default.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }

    /// Sets a pause after each attempt.
    #[must_use]
    pub fn pace(self, pace: Duration) -> Self {
        Self { pace, ..self }
    }

    /// Sets the number of datagrams sent by one UDP socket before the next is opened; 1 by default.
    #[must_use]
    pub fn per_socket(mut self, datagrams: usize) -> Self {
        self.options.push(&["--per-socket", &datagrams.to_string()]);
        self
    }

    /// Ends each attempt by TCP when the server has closed the connection, too.
    #[must_use]
    pub fn to_the_end(mut self) -> Self {
        self.options.push(&["--to-the-end"]);
        self
    }

    /// Connects the same UDP socket to the target and then to `other`, in each attempt. An attempt ends when `other`
    /// has answered; [`Attempt::elapsed_us`] is the time since the second connect().
    #[must_use]
    pub fn then(mut self, other: SocketAddr) -> Self {
        self.options.push(&["--then", &other.to_string()]);
        self
    }

    /// Makes the attempts, waits for their end and returns them.
    ///
    /// # Errors
    /// If the client cannot be run; failed attempts are part of the result.
    pub fn run(self) -> Result<Vec<Attempt>> {
        let patience = self.options.timeout + self.pace + SLACK;
        let mut command = self.command()?;
        command.args(["--count", &self.times.to_string()]).stdin(Stdio::null());
        let mut process = command.spawn()?;
        let lines = Lines::of(process.take_stdout()?);
        let mut attempts = Vec::with_capacity(self.times);
        lines.to_the_end(patience, &mut attempts).with_context(|| format!("{self:?}"))?;
        ensure!(attempts.len() == self.times, "{} of {} attempts reported", attempts.len(), self.times);
        Ok(attempts)
    }

    /// Makes one attempt.
    ///
    /// # Errors
    /// As [`Connect::run`].
    pub fn one(self) -> Result<Attempt> {
        self.times(1).run()?.pop().context("no attempt reported")
    }

    /// Starts making attempts continuously, until the result is stopped.
    ///
    /// # Errors
    /// If the client cannot be run.
    pub fn start(self) -> Result<Flow> {
        let patience = self.options.timeout + self.pace + SLACK;
        let mut command = self.command()?;
        command.arg("--until-eof");
        let mut process = command.spawn()?;
        let lines = Lines::of(process.take_stdout()?);
        let stdin = process.take_stdin()?;
        Ok(Flow { lines, attempts: Vec::new(), patience, stdin, _process: process })
    }

    fn command(&self) -> Result<Exec> {
        let mut command = self.options.command("connect")?;
        command.args(["--pace-ms", &self.pace.as_millis().to_string()]);
        Ok(command)
    }
}

/// A client that makes one attempt after the other; killed when dropped.
#[derive(Debug)]
pub struct Flow {
    lines: Lines,
    attempts: Vec<Attempt>,
    patience: Duration,
    stdin: ChildStdin,
    _process: Proc,
}

impl Flow {
    /// Returns the attempts made so far.
    ///
    /// # Errors
    /// If the client prints anything but attempts.
    pub fn so_far(&mut self) -> Result<&[Attempt]> {
        self.lines.drain(&mut self.attempts)?;
        Ok(&self.attempts)
    }

    /// Waits until `more` further attempts have ended.
    ///
    /// # Errors
    /// If they do not end within their time limits.
    pub fn wait_for(&mut self, more: usize) -> Result<()> {
        self.lines.drain(&mut self.attempts)?;
        for _ in 0..more {
            self.attempts.push(self.lines.attempt(self.patience)?);
        }
        Ok(())
    }

    /// Ends the client after its current attempt and returns all attempts.
    ///
    /// # Errors
    /// If the client died before.
    pub fn stop(self) -> Result<Vec<Attempt>> {
        let Self { lines, mut attempts, patience, stdin, _process } = self;
        drop(stdin);
        lines.to_the_end(patience, &mut attempts)?;
        Ok(attempts)
    }
}

/// A connection to be opened from a place, and kept.
#[derive(Clone, Debug)]
pub struct Hold {
    options: Options,
}

impl Hold {
    pub(super) fn new(place: &Place, target: String) -> Self {
        Self { options: Options::new(place, target) }
    }

    common_options!();

    /// Opens the connection. A refused connection is not an error: see [`Held::opened`].
    ///
    /// # Errors
    /// If the client cannot be run.
    pub fn open(self) -> Result<Held> {
        let patience = self.options.timeout + SLACK;
        let mut process = self.options.command("hold")?.spawn()?;
        let lines = Lines::of(process.take_stdout()?);
        let stdin = process.take_stdin()?;
        let opened = lines.attempt(patience).with_context(|| format!("{self:?}"))?;
        Ok(Held { opened, lines, patience, stdin, _process: process })
    }
}

/// An open connection; closed when dropped.
#[derive(Debug)]
pub struct Held {
    opened: Attempt,
    lines: Lines,
    patience: Duration,
    stdin: ChildStdin,
    _process: Proc,
}

impl Held {
    /// Returns the result of opening: over TCP with the server's greeting, over UDP only the local socket's addresses.
    pub fn opened(&self) -> &Attempt {
        &self.opened
    }

    /// Sends a line (or datagram) and waits for its answer.
    ///
    /// # Errors
    /// If the client died; an error of the connection is part of the result.
    pub fn say(&mut self, text: &str) -> Result<Attempt> {
        ensure!(!text.contains('\n'), "one line only: {text:?}");
        writeln!(self.stdin, "{text}").context("lab-pod hold does not read")?;
        self.lines.attempt(self.patience)
    }

    /// Sends a line every few milliseconds until `done` holds for the answer.
    ///
    /// # Errors
    /// With the last answer, if `done` does not hold within `patience`.
    pub fn say_until(&mut self, patience: Duration, done: impl Fn(&Attempt) -> bool) -> Result<Attempt> {
        let deadline = Instant::now() + patience;
        loop {
            let attempt = self.say("are you there?")?;
            if done(&attempt) {
                return Ok(attempt);
            }
            ensure!(Instant::now() < deadline, "still {attempt:?} after {patience:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
