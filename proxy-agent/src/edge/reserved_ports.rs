//! `net.ipv4.ip_local_reserved_ports`: keeps the kernel from giving sockets of this host a port that the packet edge
//! uses for translated sources. The setting holds for IPv6 as well.

use std::io;
use std::ops::Range;

use proxy_common::abi::flow::SNAT_PORTS;

const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Adds [`SNAT_PORTS`] to what is reserved. Where that cannot be written (a read-only `/proc/sys`) nothing happens:
/// the kernel's own range of ephemeral ports does not overlap unless somebody has changed it.
pub fn reserve() {
    match add() {
        Ok(false) => {}
        Ok(true) => tracing::info!(ports = ?SNAT_PORTS, sysctl = SYSCTL, "ports reserved"),
        Err(error) => tracing::debug!(%error, sysctl = SYSCTL, "ports not reserved"),
    }
}

/// True if something had to be added.
fn add() -> io::Result<bool> {
    let before = std::fs::read_to_string(SYSCTL)?;
    match merged(&before, &SNAT_PORTS) {
        Some(list) => std::fs::write(SYSCTL, list).map(|()| true),
        None => Ok(false),
    }
}

/// `list` (as `1-2,5`) with `range`; `None` if it is all there.
fn merged(list: &str, range: &Range<u16>) -> Option<String> {
    let list = list.trim();
    let (first, last) = (range.start, range.end.saturating_sub(1));
    let covers = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let bounds = (from.trim().parse::<u16>(), to.trim().parse::<u16>());
        matches!(bounds, (Ok(from), Ok(to)) if from <= first && last <= to)
    };
    // The kernel itself merges ranges that touch.
    (!list.split(',').any(covers)).then(|| match list {
        "" => format!("{first}-{last}"),
        list => format!("{list},{first}-{last}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::in_new_netns;

    #[test]
    fn the_range_is_added_once() {
        for (before, want) in [
            ("\n", Some("10000-29999")),
            ("8080\n", Some("8080,10000-29999")),
            ("10000-29998,30000-32767", Some("10000-29998,30000-32767,10000-29999")),
            ("10000-32767\n", None),
            ("1,9999-29999", None),
        ] {
            assert_eq!(merged(before, &SNAT_PORTS).as_deref(), want, "{before:?}");
        }
    }

    #[test]
    fn the_kernel_keeps_what_was_reserved() {
        in_new_netns(|| {
            std::fs::write(SYSCTL, "8080,29000-30100").unwrap();
            assert!(add().unwrap());
            assert_eq!(std::fs::read_to_string(SYSCTL).unwrap().trim(), "8080,10000-30100");
            assert!(!add().unwrap());
        });
    }
}
