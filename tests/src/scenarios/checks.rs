//! Checks of connections.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};

use crate::lab::{Attempt, Place, Summary};

/// Checks that every attempt was answered, and that its client sees the address that it asked for: as the peer of a
/// connected socket, or as the source of an answer.
///
/// # Errors
/// With the first attempts for which that is not true.
pub fn served(target: &str, attempts: &[Attempt]) -> Result<Summary> {
    let vip: SocketAddr = target.parse().with_context(|| target.to_owned())?;
    let wrong: Vec<&Attempt> = attempts
        .iter()
        .filter(|attempt| {
            let seen = [attempt.peername, attempt.from];
            !attempt.ok || seen.iter().flatten().any(|address| *address != vip) || seen == [None, None]
        })
        .collect();
    let summary = Summary::of(attempts);
    ensure!(!attempts.is_empty(), "no connection to {target} was made");
    ensure!(
        wrong.is_empty(),
        "{} of {} connections to {target} failed ({:?}) or see another address; the first: {:#?}",
        wrong.len(),
        attempts.len(),
        summary.by_error,
        &wrong[..wrong.len().min(3)]
    );
    Ok(summary)
}

/// Checks that these servers and no others answered, each at least half of its equal share. (With 100 connections for
/// each of up to ten servers, a server gets so few by chance less than once in a million runs.)
///
/// # Errors
/// With the distribution.
pub fn evenly(summary: &Summary, servers: &[&str]) -> Result<()> {
    let share = summary.total / servers.len().max(1);
    let mut wanted = servers.to_vec();
    wanted.sort_unstable();
    ensure!(
        summary.servers() == wanted && summary.by_server.values().all(|&count| count * 2 >= share),
        "not spread evenly over {wanted:?}: {:?}",
        summary.by_server
    );
    Ok(())
}

/// Checks that no more than `limit` different servers answered.
///
/// # Errors
/// With the distribution.
pub fn at_most(limit: usize, summary: &Summary) -> Result<()> {
    ensure!(summary.by_server.len() <= limit, "more than {limit} servers: {:?}", summary.by_server);
    Ok(())
}

/// Returns the number of SYNs that the kernel of a place has retransmitted.
///
/// # Errors
/// If the kernel's counters cannot be read.
pub fn syns_sent_again(place: &Place) -> Result<u64> {
    let mut counters = place.command("cat");
    counters.arg("/proc/net/netstat");
    let counters = counters.text()?;
    let mut lines =
        counters.lines().filter_map(|line| line.strip_prefix("TcpExt: ")).map(str::split_whitespace);
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let (_, again) = names.zip(values).find(|(name, _)| *name == "TCPSynRetrans").context("TCPSynRetrans")?;
    Ok(again.parse()?)
}

/// Returns the running kernel's version.
pub fn kernel_version() -> (u32, u32) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Returns the error of a refused connection on this kernel: programs can choose it since 5.18.
pub fn refusal() -> &'static str {
    if kernel_version() >= (5, 18) { "ECONNREFUSED" } else { "EPERM" }
}

/// Returns the error of a call of a host process whose packets would be dropped: programs can choose it since 5.18.
pub fn denial() -> &'static str {
    if kernel_version() >= (5, 18) { "EHOSTUNREACH" } else { "EPERM" }
}
