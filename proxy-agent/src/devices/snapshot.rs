//! This node's network as the kernel knows it, as plain data: links, their addresses, and routes. Read by rtnetlink
//! dumps, followed by [`crate::host::follow`]. [`super::choice`] decides from it alone; [`super::sources`] also asks
//! the kernel for routes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::TryStreamExt as _;
use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family, Prefix};
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use tokio::sync::watch;

use crate::host::addresses::address_of;
use crate::host::follow::{FollowError, RECEIVE_BUFFER, Subject, follow};

/// `RT_TABLE_LOCAL` of linux/rtnetlink.h: routes of packets that are delivered on this host.
const LOCAL_TABLE: u32 = 255;
/// `RT_TABLE_MAIN` and `RT_TABLE_DEFAULT`: routes of all packets.
const COMMON_TABLES: [u32; 2] = [254, 253];

/// Time to wait for further changes: a device comes up in several steps, and a pass over the devices costs more than a
/// dump.
const SETTLE: Duration = Duration::from_millis(50);

/// Links by interface index, and their addresses, routes and rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// The links of the network namespace.
    pub(crate) links: BTreeMap<IfIndex, Link>,
    /// Addresses that hosts can be reached by: neither link-local nor loopback, in the kernel's order.
    pub(crate) addresses: Vec<Address>,
    /// Unicast routes of every table, except those to link-local prefixes.
    pub(crate) routes: Vec<Route>,
    /// Tables, other than the common ones, by which IPv4 rules route packets from certain sources that this host does
    /// not have itself.
    pub(crate) tables_by_source: BTreeSet<u32>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Interface name.
    pub(crate) name: String,
    /// Kind of the link.
    pub(crate) kind: Kind,
    /// The kernel's name of the kind, such as `vxlan`; empty for hardware.
    pub(crate) kind_name: String,
    /// Header that its packets start with.
    pub(crate) layer: Layer,
    /// Whether it is administratively up.
    pub(crate) up: bool,
    /// Index of the bridge, bond or VRF that it is a port of.
    pub(crate) master: Option<IfIndex>,
}

/// Kinds of links, as far as they matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Hardware, bonds, VLANs and whatever else carries addresses.
    Plain,
    /// Devices by which pods are attached: veth, tap, netkit.
    Pair,
    /// A tunnel to other nodes.
    Overlay,
    /// A bridge.
    Bridge,
    /// A routing domain: its ports are devices of their own.
    Vrf,
    /// Dummies and the like, which no packet of others passes.
    Idle,
    /// The loopback device.
    Loopback,
}

/// Header that the packets of a device start with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Layer {
    /// A MAC header.
    L2,
    /// The IP header.
    L3,
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// Interface index.
    pub(crate) device: IfIndex,
    /// The address.
    pub(crate) addr: Addr,
    /// Whether the prefix is that address alone (/32, /128).
    pub(crate) single: bool,
    /// Whether packets may be sent from it: not tentative, not deprecated.
    pub(crate) usable: bool,
}

/// One next hop of a route. A route with several next hops becomes several of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// Interface index.
    pub(crate) device: IfIndex,
    /// Id of the routing table that it is in.
    pub(crate) table: u32,
    /// Destination of the route.
    pub(crate) destination: Prefix,
    /// Whether the route leads through another host.
    pub(crate) gateway: bool,
    /// Source that the route asks for.
    pub(crate) source: Option<Addr>,
}

impl Snapshot {
    /// Returns the addresses of a device.
    pub(crate) fn addresses_of(&self, device: IfIndex) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(move |address| address.device == device)
    }

    /// Returns whether a prefix is more than one address of this host.
    fn is_elsewhere(&self, prefix: Prefix) -> bool {
        prefix.mapped_len() != 128 || self.addresses.iter().all(|address| address.addr != prefix.addr())
    }

    /// Returns the routes through a device.
    pub(crate) fn routes_of(&self, device: IfIndex) -> impl Iterator<Item = &Route> {
        self.routes.iter().filter(move |route| route.device == device)
    }
}

/// Follows links, addresses and routes of the calling thread's network namespace.
///
/// # Errors
///
/// When they cannot be read for the first time.
pub(crate) async fn watch_network() -> Result<watch::Receiver<Snapshot>, FollowError> {
    let groups = &[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
    ];
    let what = "this host's devices and routes";
    follow(Subject { what, groups, settle: SETTLE, receive_buffer: RECEIVE_BUFFER }, dump).await
}

/// Reads everything once.
pub(crate) async fn dump(handle: Handle) -> Result<Snapshot, rtnetlink::Error> {
    let mut snapshot = Snapshot::default();
    let mut links = std::pin::pin!(handle.link().get().execute());
    while let Some(message) = links.try_next().await? {
        snapshot.links.insert(IfIndex(message.header.index), link(&message));
    }
    let mut addresses = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = addresses.try_next().await? {
        snapshot.addresses.extend(address(&message));
    }
    for message in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let mut routes = std::pin::pin!(handle.route().get(message).execute());
        while let Some(message) = routes.try_next().await? {
            snapshot.routes.extend(routes_in(&message));
        }
    }
    let mut rules = std::pin::pin!(handle.rule().get(IpVersion::V4).execute());
    // A kernel without rules answers with an error.
    while let Ok(Some(message)) = rules.try_next().await {
        let of_pods = table_by_source(&message).filter(|(source, _)| snapshot.is_elsewhere(*source));
        snapshot.tables_by_source.extend(of_pods.map(|(_, table)| table));
    }
    Ok(snapshot)
}

fn link(message: &LinkMessage) -> Link {
    let layer_type = message.header.link_layer_type;
    let mut link = Link {
        name: String::new(),
        kind: Kind::Plain,
        kind_name: String::new(),
        layer: layer(layer_type),
        up: message.header.flags.contains(LinkFlags::Up),
        master: None,
    };
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name.clone_from(name);
        } else if let LinkAttribute::Controller(master) = attribute {
            link.master = Some(IfIndex(*master)).filter(|index| *index != IfIndex::NONE);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            for info in infos {
                if let LinkInfo::Kind(kind) = info {
                    link.kind = kind_of(kind, link.layer);
                    link.kind_name = kind.to_string();
                }
            }
        }
    }
    if message.header.flags.contains(LinkFlags::Loopback) {
        link.kind = Kind::Loopback;
    }
    link
}

fn kind_of(kind: &InfoKind, layer: Layer) -> Kind {
    use InfoKind as K;
    if matches!(kind, K::Veth | K::Netkit) || matches!(kind, K::Tun) && layer == Layer::L2 {
        Kind::Pair
    } else if matches!(kind, K::Bridge) {
        Kind::Bridge
    } else if matches!(kind, K::Vrf) {
        Kind::Vrf
    } else if matches!(kind, K::Dummy | K::Ifb | K::Nlmon) {
        Kind::Idle
    } else if matches!(
        kind,
        K::Vxlan | K::Geneve | K::IpIp | K::SitTun | K::Ip6Tnl | K::Wireguard | K::Tun | K::BareUdp | K::Xfrm
    ) || matches!(kind, K::GreTap | K::GreTap6 | K::GreTun | K::GreTun6 | K::Vti | K::Vti6)
    {
        Kind::Overlay
    } else {
        Kind::Plain
    }
}

/// Returns L3 for the types for which the kernel itself sees no MAC header (`dev_is_mac_header_xmit` of
/// linux/if_arp.h).
fn layer(layer_type: LinkLayerType) -> Layer {
    use LinkLayerType as T;
    let without_mac = matches!(
        layer_type,
        T::None | T::Rawip | T::Ppp | T::Tunnel | T::Tunnel6 | T::Sit | T::Ipgre | T::Ip6gre | T::Pimreg
    );
    if without_mac { Layer::L3 } else { Layer::L2 }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let addr = address_of(message)?;
    let reachable = matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
    let unfit =
        AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated | AddressHeaderFlags::Dadfailed;
    let whole = if addr.family() == Family::V4 { 32 } else { 128 };
    (reachable && !is_link_local(addr) && !addr.is_loopback()).then(|| Address {
        device: IfIndex(message.header.index),
        addr,
        single: message.header.prefix_len == whole,
        usable: !message.header.flags.intersects(unfit),
    })
}

fn routes_in(message: &RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut destination = match u8::from(header.address_family) {
        2 => Addr::v4([0; 4]),
        10 => Addr::ZERO,
        _ => return Vec::new(),
    };
    let (mut device, mut gateway, mut source, mut hops) = (None, false, None, Vec::new());
    for attribute in &message.attributes {
        if let RouteAttribute::Table(id) = attribute {
            table = *id;
        } else if let RouteAttribute::Destination(to) = attribute {
            destination = addr(to).unwrap_or(destination);
        } else if let RouteAttribute::Oif(index) = attribute {
            device = Some(IfIndex(*index));
        } else if let RouteAttribute::PrefSource(from) = attribute {
            source = addr(from);
        } else if let RouteAttribute::MultiPath(next) = attribute {
            hops.extend(next.iter().map(|hop| (IfIndex(hop.interface_index), is_gateway(&hop.attributes))));
        }
        gateway |= is_gateway(std::slice::from_ref(attribute));
    }
    hops.extend(device.map(|device| (device, gateway)));
    let Some(destination) = Prefix::new(destination, header.destination_prefix_length) else {
        return Vec::new();
    };
    let counts = matches!(header.kind, RouteType::Unicast)
        && table != LOCAL_TABLE
        && !header.flags.contains(RouteFlags::Cloned)
        && !is_link_local(destination.addr());
    if counts {
        hops.into_iter()
            .map(|(device, gateway)| Route { device, table, destination, gateway, source })
            .collect()
    } else {
        Vec::new()
    }
}

/// Returns the source and the table of a rule that selects packets by source and at most by destination, unless the
/// table is a common one.
fn table_by_source(message: &RuleMessage) -> Option<(Prefix, u32)> {
    let header = &message.header;
    let (mut table, mut source) = (u32::from(header.table), None);
    for attribute in &message.attributes {
        if let RuleAttribute::Table(id) = attribute {
            table = *id;
        } else if let RuleAttribute::Source(from) = attribute {
            source = Prefix::new((*from).into(), header.src_len);
        } else if !matches!(
            attribute,
            RuleAttribute::Destination(_)
                | RuleAttribute::Priority(_)
                | RuleAttribute::Protocol(_)
                | RuleAttribute::SuppressPrefixLen(_)
        ) {
            // The rule also selects by mark, device, port or user.
            return None;
        }
    }
    let is_common = table == 0 || table == LOCAL_TABLE || COMMON_TABLES.contains(&table);
    source.filter(|_| !is_common && !header.flags.contains(RuleFlags::Invert)).map(|source| (source, table))
}

fn is_gateway(attributes: &[RouteAttribute]) -> bool {
    attributes
        .iter()
        .any(|attribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
}

fn addr(address: &RouteAddress) -> Option<Addr> {
    if let RouteAddress::Inet(v4) = address {
        Some((*v4).into())
    } else if let RouteAddress::Inet6(v6) = address {
        Some((*v6).into())
    } else {
        None
    }
}

/// Returns whether an address is in 169.254.0.0/16 or fe80::/10, or is a multicast address: never a source, never a
/// destination beyond a link.
pub(crate) fn is_link_local(addr: Addr) -> bool {
    match addr.to_ip() {
        std::net::IpAddr::V4(v4) => v4.is_link_local() || v4.is_multicast(),
        std::net::IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
    }
}

/// Asks the kernel which source it would take for a packet to `destination`, through `device` if given. Returns the
/// device that the packet would leave by, and the source.
pub(crate) async fn ask_source(
    handle: &Handle,
    destination: Addr,
    device: Option<IfIndex>,
) -> Option<(IfIndex, Addr)> {
    let (ip, whole) = (destination.to_ip(), if destination.family() == Family::V4 { 32 } else { 128 });
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: if ip.is_ipv4() { 2 } else { 10 }.into(),
        destination_prefix_length: whole,
        ..RouteHeader::default()
    };
    message.attributes.push(RouteAttribute::Destination(ip.into()));
    message.attributes.extend(device.map(|device| RouteAttribute::Oif(device.0)));
    let mut answers = std::pin::pin!(handle.route().get(message).execute());
    let answer = answers.try_next().await.ok()??;
    let (mut oif, mut source) = (None, None);
    for attribute in &answer.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            oif = Some(IfIndex(*index));
        } else if let RouteAttribute::PrefSource(from) = attribute {
            source = addr(from);
        }
    }
    Some((oif?, source?))
}
