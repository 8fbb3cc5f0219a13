//! The node's own IP of each family: pure.
//!
//! The Node object names the IPs, and `bindAddress` overrides the IP of its family. A family without an IP gets
//! loopback. The IPs serve nodePorts (`primary`), and `loadBalancerSourceRanges` use them to recognize the node.

use std::net::{Ipv4Addr, Ipv6Addr};

use proxy_common::addr::{Addr, Family};

use crate::reconcile::cluster::Node;

/// The node's IPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeIps {
    /// Indexed by [`Family::index`].
    ips: [Addr; 2],
    primary: Family,
}

impl NodeIps {
    /// Derives the IPs of the node that `node` describes. `bind_address`, a specific address, replaces the IP of its
    /// family.
    pub(crate) fn derive(node: &Node, bind_address: Option<Addr>) -> Self {
        let [v4, v6] = node.ips;
        let mut ips = [v4.unwrap_or(Ipv4Addr::LOCALHOST.into()), v6.unwrap_or(Ipv6Addr::LOCALHOST.into())];
        let mut primary = node.primary.unwrap_or(Family::V4);
        if let Some(address) = bind_address {
            primary = address.family();
            ips[primary.index()] = address;
        }
        Self { ips, primary }
    }

    /// Returns the family of the node's primary IP.
    pub(crate) fn primary(&self) -> Family {
        self.primary
    }

    /// Returns the IP of `family`; loopback if the family has none.
    pub(crate) fn of(&self, family: Family) -> Addr {
        self.ips[family.index()]
    }

    /// Returns the IPs by [`Family::index`]; `None` for a family without one.
    pub(crate) fn known(&self) -> [Option<Addr>; 2] {
        self.ips.map(|ip| Some(ip).filter(|ip| !ip.is_loopback()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sources::convert::Converter;
    use crate::sources::objects;

    /// Checks the IPs, and the family of the primary IP, of a Node with these addresses and this `bindAddress`.
    fn check(addresses: &[(&str, &str)], bind_address: Option<&str>, want: [&str; 2], primary: Family) {
        let addresses: Vec<_> =
            addresses.iter().map(|(kind, address)| json!({"type": kind, "address": address})).collect();
        let object = json!({"metadata": {"name": "n1"}, "status": {"addresses": addresses}});
        let object: objects::Node = serde_json::from_value(object).unwrap();
        let node = Converter::new("n1").node(&object).unwrap();
        let bind_address = bind_address.map(|text| text.parse::<std::net::IpAddr>().unwrap().into());
        let ips = NodeIps::derive(&node, bind_address);
        assert_eq!(Family::ALL.map(|family| ips.of(family).to_string()), want);
        assert_eq!(ips.primary(), primary);
    }

    #[test]
    fn p230_internal_ips_come_first() {
        let node =
            [("ExternalIP", "203.0.113.50"), ("InternalIP", "192.0.2.10"), ("InternalIP", "2001:db8:1::10")];
        check(&node, None, ["192.0.2.10", "2001:db8:1::10"], Family::V4);
    }

    #[test]
    fn p231_the_first_ip_is_primary() {
        let node = [("InternalIP", "2001:db8:1::10"), ("InternalIP", "192.0.2.10")];
        check(&node, None, ["192.0.2.10", "2001:db8:1::10"], Family::V6);
        // An InternalIP precedes an ExternalIP of the other family, whatever their order in the object.
        let node = [("ExternalIP", "203.0.113.50"), ("InternalIP", "2001:db8:1::10")];
        check(&node, None, ["203.0.113.50", "2001:db8:1::10"], Family::V6);
    }

    #[test]
    fn p232_a_bind_address_overrides_and_is_primary() {
        let node = [("InternalIP", "2001:db8:1::10"), ("InternalIP", "192.0.2.10")];
        check(&node, Some("198.51.100.10"), ["198.51.100.10", "2001:db8:1::10"], Family::V4);
        check(&node, Some("2001:db8:2::10"), ["192.0.2.10", "2001:db8:2::10"], Family::V6);
    }

    #[test]
    fn p233_what_nobody_names_is_loopback() {
        let ips = NodeIps::derive(&Node::default(), None);
        assert_eq!(Family::ALL.map(|family| ips.of(family).to_string()), ["127.0.0.1", "::1"]);
        assert_eq!((ips.primary(), ips.known()), (Family::V4, [None, None]));
        check(&[("InternalIP", "192.0.2.10")], None, ["192.0.2.10", "::1"], Family::V4);
        check(&[("InternalIP", "2001:db8::1")], None, ["127.0.0.1", "2001:db8::1"], Family::V6);
    }
}
