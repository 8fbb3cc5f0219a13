//! Choice of the devices that carry Service traffic, and of their roles: pure.
//!
//! *External* devices lead to clients and to other nodes: the topmost device that carries an address or a route, not
//! the ports of a bond or a bridge. *Pod* devices are the host's side of pods: veths that are ports of a bridge which
//! carries pods, or that a host route leads to. A flag that names a device takes precedence over the look of the
//! network.

use std::collections::BTreeMap;

use proxy_common::abi::IfIndex;
use proxy_common::datapath::edge::Role;

use super::snapshot::{Kind, Layer, Link, Snapshot};
use crate::config::devices::{DetectLocal, Selection, Settings};

/// A device that carries Service traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Interface name.
    pub(crate) name: String,
    /// Role of the device.
    pub(crate) role: Role,
    /// Header that its packets start with.
    pub(crate) layer: Layer,
    /// Whether everything that enters is traffic of local pods (detect-local by interface).
    pub(crate) near: bool,
    /// Index of the bridge or bond that takes over incoming packets: the network stack sees them enter through that
    /// device.
    pub(crate) owner: Option<IfIndex>,
    /// Reason for the choice.
    pub(crate) reason: String,
}

/// The chosen devices by interface index.
pub(crate) type Choices = BTreeMap<IfIndex, Choice>;

/// Chooses devices. `before` are the devices chosen so far: a device that goes down or loses its last address keeps its
/// role, so that packets are translated from the moment it is back. A device that is up and has an address is judged by
/// the snapshot alone.
pub(crate) fn choose(snapshot: &Snapshot, settings: &Settings, before: &Choices) -> Choices {
    let view = View { snapshot, settings };
    let chosen = snapshot.links.iter().filter_map(|(&index, link)| {
        let (role, reason) =
            view.role(index, link).or_else(|| view.kept(index, link, before.get(&index)?))?;
        let near = settings.detect_local.names(&view.entrance(link).name);
        let owner = view.owner(link).and(link.master);
        Some((index, Choice { name: link.name.clone(), role, layer: link.layer, near, owner, reason }))
    });
    chosen.collect()
}

/// Returns the problems of flags that name a missing device, or one that cannot be used.
pub(crate) fn problems(snapshot: &Snapshot, settings: &Settings) -> Vec<String> {
    let names = snapshot.links.values().map(|link| link.name.as_str());
    let missing = settings.devices.missing(names).map(|name| format!("there is no device `{name}`"));
    let loopback = snapshot
        .links
        .values()
        .filter(|link| link.kind == Kind::Loopback && settings.devices.names(&link.name))
        .map(|link| format!("`{}` is the loopback device: no client's packets pass it", link.name));
    missing.chain(loopback).collect()
}

struct View<'a> {
    snapshot: &'a Snapshot,
    settings: &'a Settings,
}

impl View<'_> {
    fn role(&self, index: IfIndex, link: &Link) -> Option<(Role, String)> {
        let Settings { devices, pods, .. } = self.settings;
        if link.kind == Kind::Loopback {
            None
        } else if devices.names(&link.name) {
            Some((Role::External, "named by --devices".to_owned()))
        } else if pods.names(&link.name) {
            Some((Role::Pod, "named by --pod-interfaces".to_owned()))
        } else if let Some(reason) = self.leads_to_pods(index, link) {
            (link.up && *pods == Selection::Auto).then_some((Role::Pod, reason))
        } else if link.up && *devices == Selection::Auto {
            self.leads_outside(index, link).map(|reason| (Role::External, reason))
        } else {
            None
        }
    }

    fn kept(&self, index: IfIndex, link: &Link, before: &Choice) -> Option<(Role, String)> {
        let same = before.name == link.name && self.owner(link).is_none();
        (same && !self.is_bridge_to_itself(index, link)).then(|| {
            let state = if link.up { "nothing leads there any more" } else { "down" };
            (before.role, format!("kept ({state})"))
        })
    }

    /// Returns the reason why a device is the host's side of a pod, if it is.
    fn leads_to_pods(&self, index: IfIndex, link: &Link) -> Option<String> {
        let own_network = self.snapshot.addresses_of(index).any(|address| !address.single);
        let gateway = self.snapshot.routes_of(index).any(|route| route.gateway);
        if link.kind != Kind::Pair || own_network || gateway {
            return None;
        }
        if let Some((master, bridge)) = self.master(link) {
            return self
                .is_pod_bridge(master, bridge)
                .then(|| format!("port of {}, which carries pods", bridge.name));
        }
        if let DetectLocal::NamePrefix(_) = self.settings.detect_local
            && self.settings.detect_local.names(&link.name)
        {
            return Some("named by --pod-interface-name-prefix".to_owned());
        }
        let mut routes = self.snapshot.routes_of(index);
        let host = routes.find(|route| route.destination.mapped_len() == 128)?;
        Some(format!("host route to {}", host.destination.addr()))
    }

    /// Returns whether a bridge connects pods of this node and nothing else (except tunnels to pods of other nodes).
    fn is_pod_bridge(&self, index: IfIndex, bridge: &Link) -> bool {
        if bridge.kind != Kind::Bridge {
            return false;
        }
        if matches!(&self.settings.detect_local, DetectLocal::Bridge(name) if *name == bridge.name) {
            return true;
        }
        let mut ports = self.snapshot.links.iter().filter(|(_, link)| link.master == Some(index)).peekable();
        ports.peek().is_some()
            && ports.all(|(port, link)| {
                matches!(link.kind, Kind::Pair | Kind::Overlay)
                    && self.snapshot.addresses_of(*port).next().is_none()
            })
            && self.snapshot.addresses_of(index).next().is_some()
            && !self.snapshot.routes_of(index).any(|route| route.gateway)
    }

    /// Returns whether a bridge is up with an address, and leads only to pods of this node or to nothing.
    fn is_bridge_to_itself(&self, index: IfIndex, bridge: &Link) -> bool {
        let has_address = self.snapshot.addresses_of(index).next().is_some();
        bridge.kind == Kind::Bridge && bridge.up && has_address && self.leads_outside(index, bridge).is_none()
    }

    /// Returns the reason why a device leads to clients or other nodes, if it does.
    fn leads_outside(&self, index: IfIndex, link: &Link) -> Option<String> {
        if matches!(link.kind, Kind::Idle | Kind::Loopback | Kind::Vrf) || self.owner(link).is_some() {
            return None;
        }
        let what = if link.kind == Kind::Overlay { format!("{}, ", link.kind_name) } else { String::new() };
        let mut routes = self.snapshot.routes_of(index);
        let mut to_hosts = self.snapshot.routes_of(index).filter(|route| route.gateway);
        let address = self.snapshot.addresses_of(index).next().map(|address| address.addr);
        if link.kind == Kind::Bridge {
            let ports = self.snapshot.links.values().filter(|port| port.master == Some(index)).count();
            if self.is_pod_bridge(index, link) || ports == 0 && to_hosts.next().is_none() {
                return None;
            }
        }
        if let Some(address) = address {
            Some(format!("{what}carries {address}"))
        } else if routes.any(|route| route.destination.matches_all()) {
            Some(format!("{what}carries the default route"))
        } else if let Some(route) = to_hosts.next() {
            Some(format!("{what}leads to {}", route.destination))
        } else if link.kind == Kind::Overlay {
            let route = self.snapshot.routes_of(index).next()?;
            Some(format!("{what}leads to {}", route.destination))
        } else {
            None
        }
    }

    fn master(&self, link: &Link) -> Option<(IfIndex, &Link)> {
        let index = link.master?;
        Some((index, self.snapshot.links.get(&index)?))
    }

    /// Returns the device that takes over what this one receives: its bridge or bond. A VRF does not.
    fn owner(&self, link: &Link) -> Option<&Link> {
        self.master(link).map(|(_, master)| master).filter(|master| master.kind != Kind::Vrf)
    }

    /// Returns the device through which the network stack sees packets enter.
    fn entrance<'a>(&'a self, link: &'a Link) -> &'a Link {
        self.owner(link).unwrap_or(link)
    }
}

#[cfg(test)]
mod tests;
