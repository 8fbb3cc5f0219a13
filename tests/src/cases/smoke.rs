//! A few checks of everything, for networks of other shapes than the table's.

use std::time::Duration;

use serde_json::json;

use super::objects::{case, s_dual, slice};
use super::{Case, Check, Connect, Expect, Pace};

/// Returns a case with one check for each kind of frontend, near and far endpoint, TCP and UDP, IPv4 and IPv6, refusal,
/// drop, and a pod that reaches itself.
pub fn smoke() -> Case {
    let mut case = rows();
    for check in case.steps.iter_mut().flat_map(|step| &mut step.checks) {
        if let Check::Connect(Connect { expect: Expect::Spread(..), pace, .. }) = check {
            *pace = Some(Pace { connections: 40, pause: Duration::ZERO });
        }
    }
    case
}

fn rows() -> Case {
    let ports = "web=8080, dns=1053/udp";
    let service = s_dual()
        .spec("type", "LoadBalancer")
        .ports("web 80 31080, dns 53/udp 31053, none 443")
        .spec("externalIPs", vec!["198.18.9.9"])
        .ingress(json!([{ "ip": "198.18.5.5" }, { "ip": "2001:db8:5::5" }]));
    case("smoke", "")
        .step(
            [service.clone(), slice("s1", ports, "L1, R1"), slice("s6", ports, "V1, V2")],
            "P>CIP = L1, R1
             H>CIP = L1, R1
             X>CIP = L1, R1
             P>VIP = L1, R1
             X>VIP = L1, R1
             X>EXT = L1, R1
             X>NP = L1, R1
             P>NP = L1, R1
             P>10.96.0.10:53/udp = L1:1053, R1:1053
             X>198.18.5.5:53/udp = L1:1053, R1:1053
             P6>CIP6 = V1, V2
             X6>[2001:db8:5::5]:80 = V1, V2
             X6>[2001:db8:5::5]:53/udp = V1:1053, V2:1053
             X6>[2001:db8:1::10]:31080 = V1, V2
             P>10.96.0.10:443 = REJECT
             X>198.18.5.5:443 = REJECT
             P>10.96.77.77:80 = DROP
             X>10.96.77.77:80 = DROP",
        )
        .step([service, slice("s1", ports, "L1")], "L1>CIP = L1; L1>10.96.0.10:53/udp = L1:1053")
        .done()
}

/// Returns a case in which the node's own addresses are a Service's, too, as with k3s' servicelb. The addresses appear,
/// disappear and appear again while connections of clients outside are open; nodePorts and other addresses are served
/// all the time.
pub fn at_the_node() -> Case {
    let beside = s_dual().spec("type", "NodePort").ports("web 80 31080, dns 53/udp 31053");
    let at_node = beside
        .clone()
        .spec("type", "LoadBalancer")
        .spec("externalIPs", vec!["192.0.2.10"])
        .ingress(json!([{ "ip": "192.0.2.10" }, { "ip": "2001:db8:1::10" }]));
    let ports = "web=8080, dns=1053/udp";
    let [beside, at_node] = [beside, at_node]
        .map(|service| [service, slice("s1", ports, "L1, R1"), slice("s6", ports, "V1, V2")]);
    let node_ports = "X>NP = L1, R1
                      X>192.0.2.10:31053/udp = L1:1053, R1:1053
                      X6>[2001:db8:1::10]:31080 = V1, V2
                      X6>[2001:db8:1::10]:31053/udp = V1:1053, V2:1053
                      P>NP = L1, R1
                      P6>[2001:db8:1::10]:31080 = V1, V2
                      H>NP = L1, R1";
    let own = "X>192.0.2.10:80 = L1, R1
               X>192.0.2.10:53/udp = L1:1053, R1:1053
               X6>[2001:db8:1::10]:80 = V1, V2
               X6>[2001:db8:1::10]:53/udp = V1:1053, V2:1053
               P>192.0.2.10:80 = L1, R1
               H>192.0.2.10:80 = L1, R1";
    let open =
        "open a X>NP = R1; open b X6>[2001:db8:1::10]:31080 = V2; open c X>192.0.2.10:31053/udp = R1:1053";
    let say = "say a = R1; say b = V2; say c = R1:1053";
    case("at the node", "")
        .step(beside.clone(), open)
        .step(
            at_node.clone(),
            &[say, node_ports, own, "open d X>192.0.2.10:80 = R1; open e X6>[2001:db8:1::10]:80 = V2"]
                .join("\n"),
        )
        .step(beside, &[say, "say d = R1; say e = V2", node_ports].join("\n"))
        .step(at_node, &[say, "say d = R1; say e = V2", own].join("\n"))
        .done()
}

/// Returns a case in which Y cannot reach an endpoint on this node, for nodes with a filter that blocks Y.
pub fn not_allowed() -> Case {
    let service = s_dual().spec("type", "LoadBalancer").ingress(json!([{ "ip": "198.18.5.5" }]));
    case("denied", "").step([service, slice("s1", "web=8080", "L1")], "X>VIP = L1; Y>VIP = DROP").done()
}
