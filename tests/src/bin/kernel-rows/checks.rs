//! Checks of single connections and datagrams.

use std::net::{IpAddr, SocketAddr};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Attempt, Held, Place, Proto};

use super::objects::Backend;
use super::world::{ANSWER, SILENCE};

/// Every protocol of client sockets that kernels have without a module.
pub(super) const WAYS: [Proto; 3] = [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected];

/// Expected answer: the server, and the client address that it sees.
#[derive(Clone, Copy)]
pub(super) struct Answer<'a> {
    /// The server.
    pub(super) backend: Backend,
    /// Port of the server.
    pub(super) port: u16,
    /// Client addresses that the server may see.
    pub(super) seen: &'a [&'a str],
}

impl<'a> Answer<'a> {
    /// Returns the answer of a backend on the port of most Service ports' endpoints.
    pub(super) fn from(backend: Backend, seen: &'a [&'a str]) -> Self {
        Self { backend, port: 8080, seen }
    }
}

/// Checks that one connection or datagram is answered by the expected server, that the server sees the expected client,
/// and that the client sees the address that it asked.
pub(super) fn served(place: &Place, way: Proto, target: &str, answer: Answer<'_>) -> Result<Attempt> {
    let attempt = place.connect(target).proto(way).timeout(ANSWER).one()?;
    is_served(target, &attempt, way, answer)
        .with_context(|| format!("{} to {target} by {way:?}", place.name()))?;
    Ok(attempt)
}

/// Checks the same for an attempt that was already made.
pub(super) fn is_served(target: &str, attempt: &Attempt, way: Proto, answer: Answer<'_>) -> Result<()> {
    let asked: SocketAddr = target.parse().with_context(|| target.to_owned())?;
    let Answer { backend, port, seen } = answer;
    let ip: IpAddr = if asked.is_ipv4() { backend.v4 } else { backend.v6 }.parse().context(backend.name)?;
    let at = SocketAddr::new(ip, port);
    ensure!(attempt.ok, "not answered: {attempt:?}");
    ensure!(
        attempt.server.as_deref() == Some(backend.name) && attempt.endpoint == Some(at),
        "not answered by {} at {at}: {attempt:?}",
        backend.name
    );
    let peer = attempt.peer.context("the server saw nobody")?.ip().to_string();
    ensure!(seen.contains(&peer.as_str()), "the server saw {peer}, not one of {seen:?}");
    let told = if way == Proto::UdpUnconnected { attempt.from } else { attempt.peername };
    ensure!(told == Some(asked), "the client asked for {asked} and sees {told:?}: {attempt:?}");
    // The answer to a connected socket comes from the address asked, too.
    ensure!(way != Proto::Udp || attempt.from == Some(asked), "the answer came from {:?}", attempt.from);
    Ok(())
}

/// Opens a connection that stays open.
pub(super) fn held(place: &Place, way: Proto, target: &str) -> Result<Held> {
    let held = place.hold(target).proto(way).timeout(ANSWER).open()?;
    let opened = held.opened();
    ensure!(opened.ok, "{} to {target} by {way:?}: not opened: {opened:?}", place.name());
    Ok(held)
}

/// Checks that one of the calls named by `stages` fails with this error.
pub(super) fn fails(place: &Place, way: Proto, target: &str, stages: &[&str], error: &str) -> Result<()> {
    let timeout = if error == "ETIMEDOUT" { SILENCE } else { ANSWER };
    let attempt = place.connect(target).proto(way).timeout(timeout).one()?;
    let stage = attempt.stage.as_deref().unwrap_or("none");
    ensure!(
        attempt.error.as_deref() == Some(error) && stages.contains(&stage),
        "{} to {target} by {way:?}: not {error} from {stages:?}: {attempt:?}",
        place.name()
    );
    Ok(())
}

/// Checks that no target answers; all of them are asked at the same time.
pub(super) fn silent(asked: &[(&Place, Proto, String)]) -> Result<()> {
    thread::scope(|scope| {
        let spawned = asked.iter().map(|(place, way, target)| {
            let stages: &[&str] = if *way == Proto::Tcp { &["connect"] } else { &["recv"] };
            scope.spawn(move || fails(place, *way, target, stages, "ETIMEDOUT"))
        });
        let threads: Vec<_> = spawned.collect();
        let mut results = threads.into_iter().map(thread::ScopedJoinHandle::join);
        results.try_for_each(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Checks that the call that names the destination fails.
pub(super) fn denied(place: &Place, way: Proto, target: &str, error: &str) -> Result<()> {
    fails(place, way, target, if way == Proto::UdpUnconnected { &["send"] } else { &["connect"] }, error)
}
