//! `net.ipv4.ip_local_reserved_ports`: keeps the kernel from giving sockets of this host a port that the packet edge
//! uses for translated sources. The setting holds for IPv6 as well. What is added is noted, so that just that can be taken
//! back.

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;

use proxy_common::abi::flow::SNAT_PORTS;

use crate::bpf::notes::{Note, Notes};

const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Adds [`SNAT_PORTS`] to what is reserved. Where that cannot be written (a read-only `/proc/sys`) nothing happens:
/// the kernel's own range of ephemeral ports does not overlap unless somebody has changed it.
pub fn reserve(notes: &Notes) {
    match add(notes) {
        Ok(false) => {}
        Ok(true) => tracing::info!(ports = ?SNAT_PORTS, sysctl = SYSCTL, "ports reserved"),
        Err(error) => tracing::debug!(%error, sysctl = SYSCTL, "ports not reserved"),
    }
}

/// True if something had to be added.
fn add(notes: &Notes) -> io::Result<bool> {
    let mut reserved = read()?;
    let new: BTreeSet<u16> = SNAT_PORTS.filter(|port| !reserved.contains(port)).collect();
    let new_notes: Vec<Note> = ranges(&new).into_iter().map(Note::Ports).collect();
    // Before they are there: whoever dies in between has added them.
    for note in &new_notes {
        notes.add(note).map_err(io::Error::other)?;
    }
    reserved.extend(&new);
    let written = if new.is_empty() { Ok(()) } else { write(&reserved) };
    if written.is_err() {
        for note in &new_notes {
            notes.remove(note).map_err(io::Error::other)?;
        }
    }
    written.map(|()| !new.is_empty())
}

/// Takes ports back that were added.
///
/// # Errors
///
/// What the kernel says; then they stay.
pub fn release(ports: &RangeInclusive<u16>) -> io::Result<()> {
    let mut reserved = read()?;
    let before = reserved.len();
    reserved.retain(|port| !ports.contains(port));
    let result = if reserved.len() == before { Ok(()) } else { write(&reserved) };
    result.map_err(|error| io::Error::new(error.kind(), format!("{SYSCTL}: {error}")))
}

fn read() -> io::Result<BTreeSet<u16>> {
    let text = std::fs::read_to_string(SYSCTL)?;
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no list of ports")))
}

fn write(ports: &BTreeSet<u16>) -> io::Result<()> {
    // An empty line empties it; to write nothing changes nothing.
    std::fs::write(SYSCTL, format!("{}\n", list(ports)))
}

/// The ports of a list as the kernel writes it: `1-2,5`.
fn parse(list: &str) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        ports.extend(first.trim().parse::<u16>().ok()?..=last.trim().parse().ok()?);
    }
    Some(ports)
}

/// The list of these ports.
fn list(ports: &BTreeSet<u16>) -> String {
    let ranges = ranges(ports).into_iter().map(|range| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    ranges.collect::<Vec<_>>().join(",")
}

/// The same ports, in as few ranges as possible.
fn ranges(ports: &BTreeSet<u16>) -> Vec<RangeInclusive<u16>> {
    let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some(range) if range.end().checked_add(1) == Some(port) => *range = *range.start()..=port,
            _ => ranges.push(port..=port),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::pins::PinDir;
    use crate::node::testing::in_new_netns;

    #[test]
    fn lists_as_the_kernel_writes_them() {
        for (text, want) in [
            ("\n", ""),
            ("8080\n", "8080"),
            ("10000-29998,30000-32767\n", "10000-29998,30000-32767"),
            ("1,2,3,65535\n", "1-3,65535"),
        ] {
            assert_eq!(list(&parse(text).unwrap()), want);
        }
        for text in ["x", "1-", "70000"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    /// What is left after ports were reserved, once or by one agent after the other, and taken back.
    #[test]
    fn what_was_reserved_before_stays() {
        in_new_netns(|| {
            for before in ["", "8080,29000-30100", "15000,15002", "9000-40000", "10000-29999"] {
                let dir = tempfile::tempdir().unwrap();
                let notes = Notes::of(&PinDir::new(dir.path()));
                std::fs::write(SYSCTL, format!("{before}\n")).unwrap();
                let covered = ["9000-40000", "10000-29999"].contains(&before);
                assert_eq!(add(&notes).unwrap(), !covered, "{before}");
                assert!(!add(&notes).unwrap(), "{before}");
                let reserved = read().unwrap();
                assert!({ SNAT_PORTS }.all(|port| reserved.contains(&port)), "{before}");
                let all = notes.all().unwrap();
                assert_eq!(all.is_empty(), covered, "{before}");
                // Somebody else's, meanwhile.
                std::fs::write(SYSCTL, format!("{},50000\n", list(&read().unwrap()))).unwrap();
                for note in all {
                    let Note::Ports(ports) = note else { panic!("{note:?}") };
                    release(&ports).unwrap();
                    release(&ports).unwrap();
                }
                let want = if before.is_empty() { "50000".to_owned() } else { format!("{before},50000") };
                assert_eq!(std::fs::read_to_string(SYSCTL).unwrap().trim(), want);
            }
        });
    }
}
