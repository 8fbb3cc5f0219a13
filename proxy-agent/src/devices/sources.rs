//! Source addresses of packets that leave through a device: the one that the kernel would take itself, or else another
//! of the device, or of the node.
//!
//! The source may be an address of a Service, too, as the node's own is with k3s' servicelb. A port that is a frontend
//! there is never taken as a source port (`flows::try_source`), so no reply is taken for a request.

use std::collections::BTreeMap;

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family};
use proxy_common::datapath::edge::Role;
use rtnetlink::Handle;

use super::choice::Choices;
use super::snapshot::{Kind, Snapshot, ask_source, is_link_local};

/// Facts that the agent knows and the network does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Number of times that larger maps have replaced others. The programs have to use the maps that are pinned now.
    pub(crate) maps: u64,
    /// The node's own IPs, by [`Family::index`].
    pub(crate) node_ips: [Option<Addr>; 2],
    /// A backend on another node, by [`Family::index`].
    pub(crate) remote: [Option<Addr>; 2],
}

/// Source address for each family ([`Family::index`]); [`Addr::ZERO`] where there is none.
pub(crate) type Sources = [Addr; 2];

/// Returns the sources of every chosen device. For external devices the kernel is asked how it routes to a backend, or
/// to what lies behind a gateway of the device.
pub(crate) async fn resolve(
    handle: &Handle,
    snapshot: &Snapshot,
    choices: &Choices,
    facts: &Facts,
) -> BTreeMap<IfIndex, Sources> {
    let mut towards_remote = [None; 2];
    for (answer, remote) in towards_remote.iter_mut().zip(facts.remote) {
        if let Some(remote) = remote {
            *answer = ask_source(handle, remote, None).await;
        }
    }
    let mut resolved = BTreeMap::new();
    for (&index, choice) in choices {
        let mut sources = [Addr::ZERO; 2];
        for (family, source) in Family::ALL.into_iter().zip(&mut sources) {
            let mut asked = Vec::new();
            if choice.role == Role::External {
                asked.extend(towards_remote.get(family.index()).copied().flatten());
                for destination in destinations(snapshot, index, family, facts) {
                    asked.extend(ask_source(handle, destination, Some(index)).await);
                }
            }
            let asked = asked.into_iter().filter(|(device, _)| *device == index).map(|(_, source)| source);
            *source = pick(snapshot, index, choice.role, family, facts, asked);
        }
        resolved.insert(index, sources);
    }
    resolved
}

/// Returns the destinations whose route through `device` the kernel is asked for.
fn destinations(
    snapshot: &Snapshot,
    device: IfIndex,
    family: Family,
    facts: &Facts,
) -> impl Iterator<Item = Addr> {
    let overlay = snapshot.links.get(&device).is_some_and(|link| link.kind == Kind::Overlay);
    let beyond = snapshot
        .routes_of(device)
        .filter(|route| {
            route.destination.family() == family
                && !route.destination.matches_all()
                && (route.gateway || overlay)
        })
        .map(|route| inside(route.destination))
        .min();
    beyond.into_iter().chain(facts.remote.get(family.index()).copied().flatten())
}

/// Returns the first host address of a prefix, or its only address.
fn inside(prefix: proxy_common::addr::Prefix) -> Addr {
    let next = u128::from_be_bytes(prefix.addr().bytes) | 1;
    let next = Addr { bytes: next.to_be_bytes() };
    if prefix.contains(next) { next } else { prefix.addr() }
}

/// Returns the first of `asked` that can serve; else an address that a pod device's routes ask for, one of the device,
/// of its bridge, or the node's.
fn pick(
    snapshot: &Snapshot,
    device: IfIndex,
    role: Role,
    family: Family,
    facts: &Facts,
    asked: impl Iterator<Item = Addr>,
) -> Addr {
    let routed = snapshot.routes_of(device).filter(|_| role == Role::Pod).filter_map(|route| route.source);
    let master = snapshot.links.get(&device).and_then(|link| link.master);
    let owned = std::iter::once(device).chain(master);
    let owned = owned.flat_map(|device| snapshot.addresses_of(device)).map(|address| address.addr);
    let node = facts.node_ips.iter().copied().flatten();
    asked
        .chain(routed)
        .chain(owned)
        .chain(node)
        .find(|addr| {
            addr.family() == family
                && !is_link_local(*addr)
                && snapshot.addresses.iter().any(|known| known.addr == *addr && known.usable)
        })
        .unwrap_or(Addr::ZERO)
}
