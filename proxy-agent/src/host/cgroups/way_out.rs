//! Namespace in which packets that leave a network namespace come out: for a veth pair, that of the other end.
//!
//! The cost does not depend on the number of devices and routes in the namespace: only two routes and their devices are
//! looked up.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

use proxy_common::abi::IfIndex;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use crate::host::netlink::Netlink;

/// Addresses that only default routes lead to: a reserved one (RFC 1112 §4), and one of the discard prefix (RFC 6666).
const ANYWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(240, 0, 0, 1)), IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1))];

/// Returns whether packets that leave the network namespace of the calling thread enter another one than `host`: true
/// if its default routes lead through veth pairs whose other ends are in such a namespace. Returns false for devices of
/// any other kind. Returns `None` if there is no default route, perhaps not yet.
pub(super) fn leads_elsewhere(host: &File) -> io::Result<Option<bool>> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let mut elsewhere = None;
    for destination in ANYWHERE {
        let Some(device) = device_to(&netlink, destination)? else { continue };
        let Some(end) = other_end(&netlink, device)? else { return Ok(Some(false)) };
        // The kernel gives the namespace of a device's other end an id when the device is looked up. The host's
        // namespace has no id if no device ends there.
        if id_of(&netlink, host)? == Some(end) {
            return Ok(Some(false));
        }
        elsewhere = Some(true);
    }
    Ok(elsewhere)
}

/// Sends a request to the kernel. Returns the answer, or `None` if the answer is one of the errors in `none`.
fn ask(
    netlink: &Netlink,
    request: RouteNetlinkMessage,
    none: &[i32],
) -> io::Result<Option<RouteNetlinkMessage>> {
    netlink.send(request, 0)?;
    let mut answer = None;
    netlink.answers(|payload| match payload {
        NetlinkPayload::InnerMessage(message) => {
            answer = Some(message);
            Ok(true)
        }
        NetlinkPayload::Error(error) => {
            let error = error.to_io();
            if error.raw_os_error().is_some_and(|number| none.contains(&number)) {
                Ok(true)
            } else {
                Err(error)
            }
        }
        NetlinkPayload::Done(_) | NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => Ok(true),
    })?;
    Ok(answer)
}

/// Returns the index of the device by which an address is reached.
fn device_to(netlink: &Netlink, destination: IpAddr) -> io::Result<Option<IfIndex>> {
    let mut request = RouteMessage::default();
    let (family, length, address) = match destination {
        IpAddr::V4(address) => (AddressFamily::Inet, 32, RouteAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(address)),
    };
    request.header.address_family = family;
    request.header.destination_prefix_length = length;
    request.attributes.push(RouteAttribute::Destination(address));
    // There is no route, the route is a refusal (unreachable, blackhole, prohibit), or the family is switched off
    // (ipv6.disable=1).
    let none = [
        libc::ENETUNREACH,
        libc::EHOSTUNREACH,
        libc::EACCES,
        libc::EINVAL,
        libc::EAFNOSUPPORT,
        libc::EOPNOTSUPP,
    ];
    let request = RouteNetlinkMessage::GetRoute(request);
    let Some(RouteNetlinkMessage::NewRoute(route)) = ask(netlink, request, &none)? else {
        return Ok(None);
    };
    Ok(route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Oif(index) = attribute { Some(IfIndex(*index)) } else { None }
    }))
}

/// Returns the id of the network namespace of a veth pair's other end, if that is another namespace.
fn other_end(netlink: &Netlink, device: IfIndex) -> io::Result<Option<i32>> {
    let mut request = LinkMessage::default();
    request.header.index = device.0;
    let Some(RouteNetlinkMessage::NewLink(link)) = ask(netlink, RouteNetlinkMessage::GetLink(request), &[])?
    else {
        return Ok(None);
    };
    let is_veth = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(info) if info.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let end = link
        .attributes
        .iter()
        .find_map(|attribute| if let LinkAttribute::LinkNetNsId(id) = attribute { Some(*id) } else { None });
    // The id is -1 if the kernel had no memory for an id.
    Ok(end.filter(|id| is_veth && *id >= 0))
}

/// Returns the id of a network namespace, as seen from the calling thread's namespace.
fn id_of(netlink: &Netlink, namespace: &File) -> io::Result<Option<i32>> {
    let mut request = NsidMessage::default();
    request.header.family = AddressFamily::Unspec;
    let descriptor = u32::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    request.attributes.push(NsidAttribute::Fd(descriptor));
    let Some(RouteNetlinkMessage::NewNsId(answer)) =
        ask(netlink, RouteNetlinkMessage::GetNsId(request), &[])?
    else {
        return Ok(None);
    };
    let ids = answer
        .attributes
        .iter()
        .find_map(|attribute| if let NsidAttribute::Id(id) = attribute { Some(*id) } else { None });
    // The id is -1 if the namespace has none.
    Ok(ids.filter(|id| *id >= 0))
}
