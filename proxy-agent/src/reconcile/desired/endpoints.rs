//! Choice of the endpoints of a Service port for its cluster set and its local set.

use std::sync::Arc;

use proxy_common::abi::SlotRange;
use proxy_common::abi::backend::flags;
use proxy_common::addr::Addr;
use proxy_common::be::Be16;

use super::context::Context;
use super::state::DesiredBackend;
use crate::reconcile::cluster::{Endpoint, Hints, ServicePort, Slice, SlicePort};

/// The endpoints of one Service port in one family.
pub(super) struct Endpoints {
    /// As [`super::state::DesiredPort::backends`].
    pub(super) backends: Vec<DesiredBackend>,
    /// As [`super::state::DesiredPort::empty_local`].
    pub(super) empty_local: SlotRange,
}

/// Slices of one family, sorted by their ports: a Service with many ports looks each of them up.
pub(super) struct ByPort<'a>(Vec<(&'a SlicePort, &'a Slice)>);

impl<'a> ByPort<'a> {
    pub(super) fn new(slices: impl Iterator<Item = &'a Slice>) -> Self {
        let mut ports: Vec<_> =
            slices.flat_map(|slice| slice.ports.iter().map(move |port| (port, slice))).collect();
        // Stable sort: equal ports stay in the order of the slices.
        ports.sort_by(|(one, _), (other, _)| Self::key(one).cmp(&Self::key(other)));
        Self(ports)
    }

    /// Returns protocol and name. Service ports and slice ports are joined by name, never by number: one named port
    /// may have several numbers.
    fn key(port: &SlicePort) -> (u8, &str) {
        (port.proto, &port.name)
    }

    /// Returns the number of endpoints that the slices name for a port.
    pub(super) fn count(&self, port: &ServicePort) -> usize {
        self.of((port.proto, &port.name)).iter().map(|(_, slice)| slice.endpoints.len()).sum()
    }

    fn of(&self, wanted: (u8, &str)) -> &[(&'a SlicePort, &'a Slice)] {
        let from = self.0.partition_point(|(port, _)| Self::key(port) < wanted);
        let of_name = &self.0[from..];
        &of_name[..of_name.partition_point(|(port, _)| Self::key(port) == wanted)]
    }
}

/// Selects the backends of `port` from `slices`, and the verdict while its local set is empty.
pub(super) fn select(port: &ServicePort, slices: &ByPort<'_>, context: &Context) -> Endpoints {
    let judged = judge((port.proto, &port.name), slices, context);
    // Drop if another node could answer, reject if no node can.
    let anywhere = judged.iter().any(|standing| standing.ready || standing.is_leaving());
    let backends = judged
        .iter()
        .map(|standing| DesiredBackend {
            addr: standing.addr,
            port: Be16::new(standing.port),
            flags: bit(standing.cluster.is_ok(), flags::IN_CLUSTER)
                | bit(standing.local.is_ok(), flags::IN_LOCAL)
                | bit(standing.serving, flags::SERVING)
                | bit(standing.on_this_node, flags::ON_THIS_NODE),
        })
        .filter(|backend| backend.flags & (flags::IN_CLUSTER | flags::IN_LOCAL | flags::SERVING) != 0)
        .collect();
    Endpoints { backends, empty_local: if anywhere { SlotRange::DROP } else { SlotRange::REJECT } }
}

/// An endpoint of a Service port, with the reason why it is not in a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Address of the endpoint.
    pub(crate) addr: Addr,
    /// Port of the endpoint.
    pub(crate) port: u16,
    /// Condition `ready`.
    pub(crate) ready: bool,
    /// Condition `serving`.
    pub(crate) serving: bool,
    /// Condition `terminating`.
    pub(crate) terminating: bool,
    /// Whether the endpoint is on this node.
    pub(crate) on_this_node: bool,
    /// `Ok` in the cluster set, else the reason why not.
    pub(crate) cluster: Result<(), Reason>,
    /// `Ok` in the local set, else the reason why not.
    pub(crate) local: Result<(), Reason>,
}

impl Standing {
    /// Returns whether the endpoint is used while no endpoint is ready.
    const fn is_leaving(&self) -> bool {
        self.serving && self.terminating
    }
}

/// Reason why an endpoint is not in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The endpoint is not ready, and it is not terminating.
    NotReady,
    /// The endpoint is terminating and still serves, but other endpoints are ready.
    OthersReady,
    /// The endpoint is terminating and no longer serves.
    ServesNoMore,
    /// Topology hints reserve the endpoint for other nodes.
    HintedForNodes,
    /// Topology hints reserve the endpoint for other zones.
    HintedForZones,
    /// The endpoint is not on this node, and the set is the local set.
    NotOnThisNode,
}

impl Reason {
    /// Returns the reason in words.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::NotReady => "not ready",
            Self::OthersReady => "terminating while others are ready",
            Self::ServesNoMore => "terminating and no longer serving",
            Self::HintedForNodes => "topology hints keep it for other nodes",
            Self::HintedForZones => "topology hints keep it for other zones",
            Self::NotOnThisNode => "not on this node",
        }
    }
}

/// Judges every endpoint of `port` (protocol and name) in `slices`, and returns them by address and port.
///
/// Both sets take the ready endpoints. Without a ready endpoint, they take the endpoints that terminate but still
/// serve. The two sets fall back independently, and only the cluster set heeds topology hints.
pub(super) fn judge(port: (u8, &str), slices: &ByPort<'_>, context: &Context) -> Vec<Standing> {
    let found = distinct(port, slices);
    let ready = || found.iter().map(|entry| entry.endpoint).filter(|endpoint| endpoint.ready);
    let any_ready = ready().next().is_some();
    let any_local_ready = ready().any(|endpoint| endpoint.local);
    let topology = Topology::choose(ready(), context);

    found
        .iter()
        .map(|entry| {
            let &Entry { endpoint, port } = entry;
            let &Endpoint { addr, ready, serving, terminating, local, .. } = endpoint;
            let fit = |others_ready: bool| match (ready, terminating, serving) {
                (true, ..) => Ok(()),
                (false, true, true) if !others_ready => Ok(()),
                (false, true, true) => Err(Reason::OthersReady),
                (false, true, false) => Err(Reason::ServesNoMore),
                (false, false, _) => Err(Reason::NotReady),
            };
            let hinted = if ready { topology.judge(endpoint) } else { Ok(()) };
            let here = if local { Ok(()) } else { Err(Reason::NotOnThisNode) };
            Standing {
                addr,
                port,
                ready,
                serving,
                terminating,
                on_this_node: local,
                cluster: fit(any_ready).and(hinted),
                local: here.and_then(|()| fit(any_local_ready)),
            }
        })
        .collect()
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

    /// Returns whether this entry replaces `earlier`, which names the same address and port. A terminating entry
    /// never replaces another. Among the other entries, a ready one stays.
    const fn replaces(&self, earlier: &Self) -> bool {
        let (new, old) = (self.endpoint, earlier.endpoint);
        !new.terminating && (old.terminating || new.ready || !old.ready)
    }
}

/// Returns the union over the slices, by address and port, each once.
fn distinct<'a>(port: (u8, &str), slices: &ByPort<'a>) -> Vec<Entry<'a>> {
    let mut entries = Vec::new();
    for (at, slice) in slices.of(port) {
        entries.extend(slice.endpoints.iter().map(|endpoint| Entry { endpoint, port: at.port }));
    }
    // Stable sort: entries of one key stay in the order of the slices.
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

/// Restriction of the cluster set to some of the ready endpoints.
enum Topology<'c> {
    /// No restriction.
    Everywhere,
    /// Endpoints hinted for the node of this name.
    Node(&'c str),
    /// Endpoints hinted for this zone.
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

    fn judge(&self, endpoint: &Endpoint) -> Result<(), Reason> {
        let (kept, reason) = match self {
            Self::Everywhere => return Ok(()),
            Self::Node(name) => (is_hinted_for(node_hints(endpoint), name), Reason::HintedForNodes),
            Self::Zone(zone) => (is_hinted_for(zone_hints(endpoint), zone), Reason::HintedForZones),
        };
        if kept { Ok(()) } else { Err(reason) }
    }
}

/// Returns whether hints count: every ready endpoint has one, and at least one of them names `ours`.
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
