//! P020-P036: frontends, the addresses and ports at which a Service can be reached.

use serde_json::json;

use super::Case;
use super::objects::{Object, case, s, s_dual, s_lb, slice, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P020", "an externalIP that no node has")
            .step(
                [external(), web("L1, R1")],
                "P>EXT = L1, R1 masq; H>EXT = L1, R1 masq; X>EXT = L1, R1 masq",
            )
            .done(),
        case("P021", "externalIPs that are none are skipped")
            .step(
                [s().spec("externalIPs", vec!["198.18.9.9", "2001:db8:99::9", "not-an-ip", ""]), web("L1")],
                "frontends4 = 10.96.0.10:80, 198.18.9.9:80; P>CIP = L1; P>EXT = L1",
            )
            .done(),
        case("P022", "externalIPs are switched off")
            .config(|config| config.allow_external_ips = false)
            .step([external(), web("L1, R1")], "P>EXT = PASS; X>EXT = PASS; P>CIP = L1, R1")
            .done(),
        case("P023", "a load-balancer address with ipMode VIP")
            .step(
                [s_lb().ingress(json!([{ "ip": "198.18.5.5", "ipMode": "VIP" }])), web("L1")],
                "P>VIP = L1 masq; H>VIP = L1 masq",
            )
            .done(),
        case("P024", "a load-balancer address with ipMode Proxy belongs to the balancer")
            .step(
                [s_lb().ingress(json!([{ "ip": "198.18.5.5", "ipMode": "Proxy" }])), web("L1")],
                "P>VIP = PASS; H>VIP = PASS; P>NP = L1 masq; X>NP = L1 masq",
            )
            .done(),
        case("P025", "two load-balancer addresses")
            .step(
                [s_lb().ingress(json!([{ "ip": "198.18.5.5" }, { "ip": "198.18.5.7" }])), web("L1")],
                "P>198.18.5.7:80 = L1 masq; X>198.18.5.7:80 = L1 masq; P>VIP = L1 masq",
            )
            .done(),
        case("P026", "a nodePort on the primary address")
            .step(
                [s().node_port(), web("L1, R1")],
                "X>NP = L1, R1 masq; H>NP = L1, R1 masq; P>NP = L1, R1 masq; Q>NP = L1, R1 masq",
            )
            .done(),
        case("P027", "no nodePort on a secondary address")
            .step(
                [s().node_port(), web("L1, R1")],
                "X>198.51.100.10:31080 = PASS; P>198.51.100.10:31080 = PASS",
            )
            .done(),
        case("P028", "nodePorts on the addresses in two CIDRs")
            .config(|config| config.node_port_addresses = vec!["192.0.2.0/24", "198.51.100.0/24"])
            .step(
                [s().node_port(), web("L1, R1")],
                "X>198.51.100.10:31080 = L1, R1 masq
                 P>198.51.100.10:31080 = L1, R1 masq
                 H>NP = L1, R1 masq",
            )
            .done(),
        case("P029", "nodePorts on all addresses, loopback never")
            .config(|config| config.node_port_addresses = vec!["0.0.0.0/0"])
            .step(
                [s().node_port(), web("L1, R1")],
                "X>198.51.100.10:31080 = L1, R1 masq
                 P>198.51.100.10:31080 = L1, R1 masq
                 H>127.0.0.1:31080 = PASS",
            )
            .done(),
        case("P030", "CIDRs of one family leave the other open")
            .config(|config| config.node_port_addresses = vec!["192.0.2.0/24"])
            .step(
                [s_dual().node_port(), web("V1")],
                "X6>[2001:db8:2::10]:31080 = V1 masq; P6>[2001:db8:2::10]:31080 = V1 masq",
            )
            .done(),
        case("P031", "a CIDR of loopback addresses selects nothing")
            .config(|config| config.node_port_addresses = vec!["127.0.0.0/8"])
            .step(
                [s().node_port(), web("L1, R1")],
                "H>127.0.0.1:31080 = PASS; X>NP = PASS; P>NP = PASS; H>NP = PASS",
            )
            .done(),
        case("P032", "a load balancer without nodePorts")
            .step(
                [s_lb().ports("web 80 0"), web("L1")],
                "X>VIP = L1 masq; P>VIP = L1 masq
                 frontends4 = 10.96.0.10:80, 198.18.9.9:80, 198.18.5.5:80",
            )
            .done(),
        case("P033", "another node's nodePort is that node's business")
            .step([s().node_port(), web("L1, R1")], "P>192.0.2.20:31080 = PASS; H>192.0.2.20:31080 = PASS")
            .done(),
        case("P034", "a nodePort over IPv6")
            .step(
                [s_dual().node_port(), web("V1")],
                "X6>[2001:db8:1::10]:31080 = V1 masq
                 P6>[2001:db8:1::10]:31080 = V1 masq
                 X6>[2001:db8:2::10]:31080 = PASS
                 P6>[2001:db8:2::10]:31080 = PASS",
            )
            .done(),
        case("P035", "one nodePort number over TCP and UDP")
            .step(
                [
                    s().node_port().ports("t 80 31080, u 80/udp 31080"),
                    slice("s1", "t=8080, u=9090/udp", "L1"),
                ],
                "X>NP = L1 masq; X>NP/udp = L1:9090 masq; P>NP = L1 masq; P>NP/udp = L1:9090 masq",
            )
            .done(),
        case("P036", "a nodePort is not served on an externalIP")
            .step(
                [s().node_port().spec("externalIPs", vec!["198.18.9.9"]), web("L1")],
                "X>198.18.9.9:31080 = PASS; P>198.18.9.9:31080 = PASS; P>EXT = L1 masq",
            )
            .done(),
    ]
}

fn external() -> Object {
    s().spec("externalIPs", vec!["198.18.9.9"])
}
