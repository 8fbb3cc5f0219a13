//! A heavy Service: heavier than a turn, it is programmed in parts.

use std::sync::Arc;

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{DesiredPort, PortKey};
use crate::reconcile::plan::LostClaims;

/// Size of a part: frontends, endpoints and source ranges together. Every other Service waits while a part is programmed:
/// one of 4 096 took up to 33 ms of CPU time, and longer where processors are shared.
pub(super) const PART: usize = 1_024;

/// A Service that is programmed in parts.
#[derive(Debug)]
pub(super) struct Begun {
    /// The Service.
    pub(super) service: ObjectKey,
    /// `metadata.creationTimestamp`.
    pub(super) created: i64,
    /// Problems of its desired state.
    pub(super) problems: Vec<String>,
    /// Reasons of parts that had no room.
    pub(super) refused: Vec<String>,
    /// Its claims that other Services have.
    pub(super) lost: LostClaims,
    /// Whether connected UDP sockets may be connected to the wrong backend now.
    pub(super) udp_stale: bool,
    /// Remaining ports, the next one last.
    ports: Vec<DesiredPort>,
    gone: Vec<Arc<PortKey>>,
}

impl Begun {
    /// Begins with `ports` to program and ports that are `gone` to remove, both in order.
    pub(super) fn new(
        service: ObjectKey,
        created: i64,
        mut ports: Vec<DesiredPort>,
        mut gone: Vec<Arc<PortKey>>,
        problems: Vec<String>,
    ) -> Self {
        ports.reverse();
        gone.reverse();
        let (refused, lost) = (Vec::new(), LostClaims::default());
        Self { service, created, problems, refused, lost, udp_stale: false, ports, gone }
    }

    /// Returns the ports of the next part, in order, and the ports to remove with it. `weight` returns the cost of
    /// removing a port.
    pub(super) fn next(
        &mut self,
        weight: impl Fn(&PortKey) -> usize,
    ) -> (Vec<DesiredPort>, Vec<Arc<PortKey>>) {
        let mut left = PART;
        let ports = take(&mut self.ports, &mut left, |port| self::weight(port) + weight(&port.key));
        let gone = match self.ports.is_empty() {
            true => take(&mut self.gone, &mut left, |key| weight(key)),
            false => Vec::new(),
        };
        (ports, gone)
    }

    /// Returns whether there is no next part.
    pub(super) fn is_done(&self) -> bool {
        self.ports.is_empty() && self.gone.is_empty()
    }
}

/// Takes elements while their weight fits into `left`, and at least one.
fn take<T>(from: &mut Vec<T>, left: &mut usize, weight: impl Fn(&T) -> usize) -> Vec<T> {
    let mut taken = Vec::new();
    while let Some(next) = from.pop_if(|next| taken.is_empty() || weight(next) <= *left) {
        *left = left.saturating_sub(weight(&next));
        taken.push(next);
    }
    taken
}

fn weight(port: &DesiredPort) -> usize {
    1 + port.frontends.len() + port.backends.len() + port.source_ranges.len()
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::SlotRange;
    use proxy_common::addr::{Addr, Family, Prefix};

    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("a", name)
    }

    fn port_key(number: usize) -> Arc<PortKey> {
        let port_name = format!("{number:02}").into();
        Arc::new(PortKey { service: key("s"), port_name, proto: 6, family: Family::V4 })
    }

    /// Returns a port that costs a sixteenth of a part.
    fn port(number: usize) -> DesiredPort {
        DesiredPort {
            key: PortKey::clone(&port_key(number)),
            frontends: Vec::new(),
            backends: Vec::new(),
            empty_local: SlotRange::REJECT,
            affinity_seconds: 0,
            source_ranges: vec![Prefix::new(Addr::ZERO, 0).unwrap(); PART / 16 - 1],
        }
    }

    #[test]
    fn parts_have_their_size_and_what_goes_goes_last() {
        let gone: Vec<_> = (50..60).map(port_key).collect();
        let mut begun = Begun::new(key("s"), 0, (0..20).map(port).collect(), gone, Vec::new());
        let mut parts = Vec::new();
        while !begun.is_done() {
            // Removing a port costs a quarter of a part, and so does replacing number 18.
            let (ports, gone) = begun.next(|key| match &*key.port_name {
                "18" => PART / 4,
                name if name < "50" => 0,
                _ => PART / 4,
            });
            parts.push((ports.len(), gone.len()));
        }
        assert_eq!(parts, [(16, 0), (4, 2), (0, 4), (0, 4)]);
        // A port that is heavier than a part is one of its own.
        let mut begun = Begun::new(key("s"), 0, (0..2).map(port).collect(), Vec::new(), Vec::new());
        assert_eq!(begun.next(|_| PART).0.len(), 1);
        assert_eq!(begun.next(|_| PART).0.len(), 1);
        assert!(begun.is_done());
    }
}
