//! `net.ipv4.ip_local_reserved_ports`: keeps the kernel from giving sockets of this host a port that the packet edge
//! uses for translated sources, or a nodePort of UDP or SCTP. A packet to such a nodePort could be a request to the
//! Service or a reply to the socket. The setting holds for IPv6 as well. Added ports are noted, so that exactly these
//! can be taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::time::Duration;

use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::{FrontendKey, FrontendKind, FrontendValue, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use tokio::sync::watch;

use crate::bpf::notes::{Note, Notes};
use crate::reconcile::store::Op;

const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Size of the buffer in bytes. It holds more than the longest list: every other port, in five digits, with a comma.
const LONGEST: usize = 1 << 18;

/// nodePorts of UDP and SCTP; absent until the first list has been programmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DatagramPorts(Option<BTreeSet<u16>>);

impl DatagramPorts {
    /// Takes in what has been programmed: `ops` just now, `frontends` altogether.
    pub(crate) fn programmed(&mut self, ops: &[Op], frontends: &BTreeMap<FrontendKey, FrontendValue>) {
        if self.0.is_some()
            && !ops.iter().any(|op| matches!(op, Op::Frontend(key, _) if is_datagram_node_port(key)))
        {
            return;
        }
        let all = [Addr::v4([0; 4]), Addr::ZERO].into_iter().flat_map(|any| {
            let (first, last) = (Be16::new(0), Be16::new(u16::MAX));
            frontends
                .range(FrontendKey::node_port(any, first, 0)..=FrontendKey::node_port(any, last, u8::MAX))
        });
        self.0 =
            Some(all.filter(|(key, _)| is_datagram_node_port(key)).map(|(key, _)| key.port.get()).collect());
    }
}

fn is_datagram_node_port(key: &FrontendKey) -> bool {
    key.kind == FrontendKind::NodePort as u8 && matches!(key.proto, proto::UDP | proto::SCTP)
}

/// Shortest time between two changes.
const REST: Duration = Duration::from_secs(1);

/// Keeps `ports` reserved as they come and go.
pub(crate) async fn follow(notes: Notes, mut ports: watch::Receiver<DatagramPorts>) {
    loop {
        let (notes, DatagramPorts(known)) = (notes.clone(), ports.borrow_and_update().clone());
        // `keep` reads and writes files. An error here is a panic, which has been printed.
        let _ = tokio::task::spawn_blocking(move || keep(&notes, known.as_ref())).await;
        tokio::time::sleep(REST).await;
        if ports.changed().await.is_err() {
            return;
        }
    }
}

/// Reserves [`SNAT_PORTS`] and `others`, and takes back ports that were added and are not wanted any more; without
/// `others`, takes back nothing. Does nothing where the setting cannot be written (a read-only `/proc/sys`): the
/// kernel's own range of ephemeral ports does not overlap with either unless somebody has changed it.
pub(crate) fn keep(notes: &Notes, others: Option<&BTreeSet<u16>>) {
    let wanted = SNAT_PORTS.chain(others.into_iter().flatten().copied()).collect();
    let kept = add(notes, &wanted).and_then(|added| {
        let removed = if others.is_some() { remove_others(notes, &wanted)? } else { Vec::new() };
        Ok((added, removed))
    });
    match kept {
        Ok((added, removed)) if added.is_empty() && removed.is_empty() => {}
        Ok((added, removed)) => tracing::info!(?added, ?removed, sysctl = SYSCTL, "ports reserved"),
        Err(error) => tracing::debug!(%error, sysctl = SYSCTL, "ports not reserved"),
    }
}

/// Reserves ports. Returns those that were not reserved before.
fn add(notes: &Notes, wanted: &BTreeSet<u16>) -> io::Result<Vec<RangeInclusive<u16>>> {
    let mut reserved = read()?;
    let new: BTreeSet<u16> = wanted.difference(&reserved).copied().collect();
    if new.is_empty() {
        return Ok(Vec::new());
    }
    let ranges = ranges(&new);
    // The notes are written first: an agent that dies in between then leaves no added port without a note.
    for range in &ranges {
        notes.add(&Note::Ports(range.clone())).map_err(io::Error::other)?;
    }
    reserved.extend(&new);
    if let Err(error) = write(&reserved) {
        for range in ranges {
            notes.remove(&Note::Ports(range)).map_err(io::Error::other)?;
        }
        return Err(error);
    }
    Ok(ranges)
}

/// Takes back the added ports that are not `wanted`. Returns them.
fn remove_others(notes: &Notes, wanted: &BTreeSet<u16>) -> io::Result<Vec<RangeInclusive<u16>>> {
    let mut all_stale = BTreeSet::new();
    let mut old = Vec::new();
    for note in notes.all().map_err(io::Error::other)? {
        let Note::Ports(ports) = &note else { continue };
        let (left, stale): (BTreeSet<u16>, BTreeSet<u16>) =
            ports.clone().partition(|port| wanted.contains(port));
        if stale.is_empty() {
            continue;
        }
        for range in ranges(&left) {
            notes.add(&Note::Ports(range)).map_err(io::Error::other)?;
        }
        all_stale.extend(stale);
        old.push(note);
    }
    if !all_stale.is_empty() {
        let reserved = read()?;
        write(&reserved.difference(&all_stale).copied().collect())?;
    }
    for note in old {
        notes.remove(&note).map_err(io::Error::other)?;
    }
    Ok(ranges(&all_stale))
}

/// Takes back added ports.
///
/// # Errors
///
/// The kernel's error; the ports then stay reserved.
pub(crate) fn release(ports: &RangeInclusive<u16>) -> io::Result<()> {
    let mut reserved = read()?;
    let before = reserved.len();
    reserved.retain(|port| !ports.contains(port));
    let result = if reserved.len() == before { Ok(()) } else { write(&reserved) };
    result.map_err(|error| io::Error::new(error.kind(), format!("{SYSCTL}: {error}")))
}

fn read() -> io::Result<BTreeSet<u16>> {
    // The kernel answers a single read: what does not fit is lost. (The standard library begins with 32 bytes.)
    let mut text = vec![0; LONGEST];
    let length = File::open(SYSCTL)?.read(&mut text)?;
    let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no list of ports")))
}

fn write(ports: &BTreeSet<u16>) -> io::Result<()> {
    // An empty line empties the list; writing nothing changes nothing.
    std::fs::write(SYSCTL, format!("{}\n", list(ports)))
}

/// Parses a list of ports as the kernel writes it: `1-2,5`.
fn parse(list: &str) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        ports.extend(first.trim().parse::<u16>().ok()?..=last.trim().parse().ok()?);
    }
    Some(ports)
}

/// Formats ports as such a list.
fn list(ports: &BTreeSet<u16>) -> String {
    let ranges = ranges(ports).into_iter().map(|range| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    ranges.collect::<Vec<_>>().join(",")
}

/// Returns the same ports in as few ranges as possible.
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
    use crate::host::testing::in_new_netns;

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

    /// Reserves ports, once or by one agent after the other, takes them back, and checks what is left.
    #[test]
    fn what_was_reserved_before_stays() {
        let long = list(&(40_000..65_000).step_by(3).collect());
        in_new_netns(|| {
            for before in ["", "8080,29000-30100", "15000,15002", "9000-40000", "10000-29999", &long] {
                let dir = tempfile::tempdir().unwrap();
                let notes = Notes::of(&PinDir::new(dir.path()));
                let wanted: BTreeSet<u16> = SNAT_PORTS.collect();
                std::fs::write(SYSCTL, format!("{before}\n")).unwrap();
                let covered = ["9000-40000", "10000-29999"].contains(&before);
                assert_eq!(add(&notes, &wanted).unwrap().is_empty(), covered, "{before}");
                assert_eq!(add(&notes, &wanted).unwrap(), [], "{before}");
                let reserved = read().unwrap();
                assert!(wanted.is_subset(&reserved), "{before}");
                let all = notes.all().unwrap();
                assert_eq!(all.is_empty(), covered, "{before}");
                // Somebody else reserves a port meanwhile.
                std::fs::write(SYSCTL, format!("{},50000\n", list(&read().unwrap()))).unwrap();
                for note in all {
                    let Note::Ports(ports) = note else { panic!("{note:?}") };
                    release(&ports).unwrap();
                    release(&ports).unwrap();
                }
                let want = if before.is_empty() { "50000".to_owned() } else { format!("{before},50000") };
                assert_eq!(read().unwrap(), parse(&want).unwrap());
            }
        });
    }

    /// nodePorts come and go. A port that somebody else has reserved stays reserved. So do added ports while the agent
    /// does not know the nodePorts yet.
    #[test]
    fn node_ports_are_reserved_while_they_are_there() {
        in_new_netns(|| {
            let dir = tempfile::tempdir().unwrap();
            let notes = Notes::of(&PinDir::new(dir.path()));
            std::fs::write(SYSCTL, "30002\n").unwrap();
            for (ports, want) in [
                (None, "10000-29999,30002"),
                (Some(&[30_001, 30_002, 30_003, 40_000][..]), "10000-29999,30001-30003,40000"),
                (None, "10000-29999,30001-30003,40000"),
                (Some(&[30_003, 40_000, 40_001]), "10000-29999,30002-30003,40000-40001"),
                (Some(&[40_001]), "10000-29999,30002,40001"),
                (Some(&[]), "10000-29999,30002"),
            ] {
                let ports = ports.map(|ports: &[u16]| ports.iter().copied().collect());
                for _ in 0..2 {
                    keep(&notes, ports.as_ref());
                    assert_eq!(list(&read().unwrap()), want, "{ports:?}");
                }
            }
            assert_eq!(notes.all().unwrap(), [Note::Ports(10_000..=29_999)]);
        });
    }
}
