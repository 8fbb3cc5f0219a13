//! Which endpoints of a Service port are in its cluster set and in its local set.

use std::sync::Arc;

use proxy_common::abi::SlotRange;
use proxy_common::abi::backend::flags;
use proxy_common::addr::Addr;
use proxy_common::be::Be16;

use super::{Context, DesiredBackend};
use crate::cluster::{Endpoint, Hints, ServicePort, Slice};

/// The endpoints of one Service port in one family.
pub(super) struct Endpoints {
    /// As [`super::DesiredPort::backends`].
    pub(super) backends: Vec<DesiredBackend>,
    /// As [`super::DesiredPort::empty_local`].
    pub(super) empty_local: SlotRange,
}

/// What the endpoints of `port` in `slices` (all of one family) come to.
///
/// Both sets take the ready endpoints, and while there are none of those the ones that terminate but still serve.
/// The two fall back independently, and only the cluster set heeds topology hints.
pub(super) fn select<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a Slice>,
    context: &Context,
) -> Endpoints {
    let found = distinct(port, slices);
    let endpoints = || found.iter().map(|entry| entry.endpoint);
    let local = || endpoints().filter(|e| e.local);
    let ready = |e: &Endpoint| e.ready;
    let leaving = |e: &Endpoint| e.serving && e.terminating;

    let any_ready = endpoints().any(ready);
    let any_local_ready = local().any(ready);
    let topology = Topology::choose(endpoints().filter(|e| e.ready), context);

    let state = |e: &Endpoint| {
        let in_cluster = if any_ready { e.ready && topology.keeps(e) } else { leaving(e) };
        let in_local = e.local && if any_local_ready { e.ready } else { leaving(e) };
        bit(in_cluster, flags::IN_CLUSTER)
            | bit(in_local, flags::IN_LOCAL)
            | bit(e.serving, flags::SERVING)
            | bit(e.local, flags::ON_THIS_NODE)
    };
    let backends = found
        .iter()
        .map(|entry| DesiredBackend {
            addr: entry.endpoint.addr,
            port: Be16::new(entry.port),
            flags: state(entry.endpoint),
        })
        .filter(|backend| backend.flags & (flags::IN_CLUSTER | flags::IN_LOCAL | flags::SERVING) != 0)
        .collect();

    // Silence where another node could answer, a refusal where nobody can.
    let anywhere = any_ready || endpoints().any(leaving);
    Endpoints { backends, empty_local: if anywhere { SlotRange::DROP } else { SlotRange::REJECT } }
}

const fn bit(set: bool, bit: u32) -> u32 {
    if set { bit } else { 0 }
}

/// An endpoint as one slice names it for a Service port.
#[derive(Clone, Copy)]
struct Entry<'a> {
    endpoint: &'a Endpoint,
    port: u16,
}

impl Entry<'_> {
    const fn key(&self) -> (Addr, u16) {
        (self.endpoint.addr, self.port)
    }

    /// Whether this entry replaces `earlier`, which names the same address and port. One that terminates never
    /// does; among the others a ready one stays.
    const fn replaces(&self, earlier: &Self) -> bool {
        let (new, old) = (self.endpoint, earlier.endpoint);
        !new.terminating && (old.terminating || new.ready || !old.ready)
    }
}

/// The union over the slices, by address and port, each once.
fn distinct<'a>(port: &ServicePort, slices: impl Iterator<Item = &'a Slice>) -> Vec<Entry<'a>> {
    let mut entries = Vec::new();
    for slice in slices {
        // Joined by name, never by number: one named port may have several numbers.
        for at in slice.ports.iter().filter(|p| p.proto == port.proto && p.name == port.name) {
            entries.extend(slice.endpoints.iter().map(|endpoint| Entry { endpoint, port: at.port }));
        }
    }
    // Stable: entries of one key stay in the order of the slices.
    entries.sort_by_key(Entry::key);
    entries.dedup_by(|new, kept| {
        let same = new.key() == kept.key();
        if same && new.replaces(kept) {
            *kept = *new;
        }
        same
    });
    entries
}

/// Which ready endpoints the cluster set is narrowed to.
enum Topology<'c> {
    /// No narrowing.
    Everywhere,
    /// Those hinted for the node of this name.
    Node(&'c str),
    /// Those hinted for this zone.
    Zone(&'c str),
}

impl<'c> Topology<'c> {
    fn choose<'a>(ready: impl Iterator<Item = &'a Endpoint> + Clone, context: &'c Context) -> Self {
        if applies(ready.clone(), node_hints, &context.node_name) {
            return Self::Node(&context.node_name);
        }
        match &context.node.zone {
            Some(zone) if applies(ready, zone_hints, zone) => Self::Zone(zone),
            Some(_) | None => Self::Everywhere,
        }
    }

    fn keeps(&self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Node(name) => is_hinted_for(node_hints(endpoint), name),
            Self::Zone(zone) => is_hinted_for(zone_hints(endpoint), zone),
        }
    }
}

/// Hints count when every ready endpoint has one and at least one of them means `ours`.
fn applies<'a>(
    mut ready: impl Iterator<Item = &'a Endpoint>,
    hints: fn(&Endpoint) -> &[Arc<str>],
    ours: &str,
) -> bool {
    let mut found = false;
    ready.all(|endpoint| {
        let hints = hints(endpoint);
        found |= is_hinted_for(hints, ours);
        !hints.is_empty()
    }) && found
}

fn is_hinted_for(hints: &[Arc<str>], ours: &str) -> bool {
    hints.iter().any(|hint| **hint == *ours)
}

fn node_hints(endpoint: &Endpoint) -> &[Arc<str>] {
    endpoint.hints.as_deref().map_or(&[], |Hints { nodes, .. }| nodes)
}

fn zone_hints(endpoint: &Endpoint) -> &[Arc<str>] {
    endpoint.hints.as_deref().map_or(&[], |Hints { zones, .. }| zones)
}
