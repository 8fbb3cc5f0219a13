//! Detects IPsec by its xfrm policies, which the packet edge cannot serve. On the way out the kernel matches packets
//! against the policies before it runs the programs of devices; on the way in, after that.

use std::io;

use rtnetlink::packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator, parse_u32,
};
use rtnetlink::sys::protocols::NETLINK_XFRM;

use crate::host::netlink::Netlink;

/// Problem that is reported where there are such policies.
pub(super) const PROBLEM: &str = "the kernel has IPsec policies (`ip xfrm policy`). It matches packets of Services with pods' \
    addresses: an answer to a client outside is not encrypted by a policy for the Service's address, and not translated if one \
    for the pod's address encrypts it; requests that come encrypted are not served, except by a tunnel whose `fwd` policy \
    covers client and pod. Policies for traffic that no Service has do no harm; for clients of Services use tunnels that are \
    devices (xfrm interfaces, WireGuard)";

/// File that lists the sockets of netlink families, the kernel's own among them.
const SOCKETS: &str = "/proc/thread-self/net/netlink";

/// Numbers of linux/xfrm.h.
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRMA_IF_ID: u16 = 31;
/// Size of `struct xfrm_userpolicy_info`, and offset of the direction in it.
const POLICY_LEN: usize = 168;
const DIRECTION_AT: usize = 160;
/// Lowest direction of policies that belong to one socket.
const SOCKET_POLICIES: u8 = 3;

/// Returns whether the kernel has policies that packets are matched against whatever device they pass. Policies of an
/// xfrm interface do not count: packets through that interface meet its programs first.
///
/// # Errors
///
/// The kernel's error.
pub(super) fn has_policies() -> io::Result<bool> {
    // Opening an xfrm socket would make the kernel load the module.
    if !is_registered(&std::fs::read_to_string(SOCKETS)?) {
        return Ok(false);
    }
    let mut found = false;
    Netlink::open(NETLINK_XFRM)?.dump(ListPolicies, |policy: Policy| {
        found |= policy.direction < SOCKET_POLICIES && policy.interface == 0;
    })?;
    Ok(found)
}

/// Returns whether the kernel listens to the family of xfrm.
fn is_registered(sockets: &str) -> bool {
    let mut families = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
    families.any(|family| family.parse() == Ok(NETLINK_XFRM))
}

/// Request for all policies.
struct ListPolicies;

impl NetlinkSerializable for ListPolicies {
    fn message_type(&self) -> u16 {
        XFRM_MSG_GETPOLICY
    }

    fn buffer_len(&self) -> usize {
        0
    }

    fn serialize(&self, _: &mut [u8]) {}
}

/// A policy, with the fields that matter here.
struct Policy {
    direction: u8,
    /// Interface id (`XFRMA_IF_ID`); 0 for none.
    interface: u32,
}

impl NetlinkDeserializable for Policy {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (info, attributes) = payload
            .split_at_checked(POLICY_LEN)
            .ok_or_else(|| DecodeError::buffer_too_small(payload.len(), POLICY_LEN))?;
        let mut policy = Self { direction: info[DIRECTION_AT], interface: 0 };
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            if attribute.kind() == XFRMA_IF_ID {
                policy.interface = parse_u32(attribute.value())?;
            }
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::testing::{in_new_netns, ip};

    /// Uses lines as the kernel lists them in a network namespace with xfrm, beside other families.
    #[test]
    fn the_family_is_looked_for_before_it_is_asked() {
        let head =
            "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n";
        assert!(!is_registered(head));
        assert!(!is_registered(&[head, &socket(0), &socket(16)].concat()));
        assert!(is_registered(&[head, &socket(0), &socket(6)].concat()));
    }

    fn socket(family: u8) -> String {
        format!(
            "000000008a1f6c5e {family:<3} 0          00000000 0        0        0     2        0        4\n"
        )
    }

    #[test]
    fn policies_count_while_they_are_there() {
        in_new_netns(|| {
            if !is_registered(&std::fs::read_to_string(SOCKETS).unwrap()) {
                eprintln!("this kernel has no xfrm");
                assert!(!has_policies().unwrap());
                return;
            }
            assert!(!has_policies().unwrap());
            for direction in ["in", "out", "fwd"] {
                policy("add", direction, "");
                assert!(has_policies().unwrap(), "{direction}");
                policy("delete", direction, "");
                assert!(!has_policies().unwrap(), "{direction}");
            }
            policy("add", "out", "if_id 7");
            assert!(!has_policies().unwrap(), "those of an interface");
            // More policies than fit into one answer.
            let many: String = (0..200)
                .map(|n| format!("xfrm policy add src 192.0.2.{n}/32 dst 198.51.100.1/32 dir out if_id 8\n"))
                .collect();
            ip(&many);
            assert!(!has_policies().unwrap());
            policy("add", "in", "");
            assert!(has_policies().unwrap());
        });
    }

    fn policy(verb: &str, direction: &str, more: &str) {
        ip(&format!("xfrm policy {verb} src 192.0.2.0/24 dst 198.51.100.0/24 dir {direction} {more}\n"));
    }
}
