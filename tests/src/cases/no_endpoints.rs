//! P140-P149: no endpoints, unused ports, unused addresses.

use super::Case;
use super::objects::{case, s, s_lb, slice, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P140", "no endpoints at all")
            .step(
                [s_lb()],
                "P>CIP = REJECT
                 X>EXT = REJECT
                 X>VIP = REJECT
                 P>NP = REJECT
                 X>NP = REJECT
                 H>CIP = REJECT
                 P>VIP = REJECT
                 H>NP = REJECT
                 Q>NP = REJECT
                 X>CIP = REJECT",
            )
            .done(),
        case("P141", "no endpoints, UDP")
            .step([s().ports("dns 53/udp")], "P>10.96.0.10:53/udp = REJECT; X>10.96.0.10:53/udp = REJECT")
            .done(),
        case("P142", "another port or protocol of a clusterIP")
            .step(
                [s(), web("L1")],
                "P>10.96.0.10:81 = REJECT; P>CIP/udp = REJECT; H>10.96.0.10:81 = REJECT; X>CIP/udp = REJECT",
            )
            .done(),
        case("P143", "an address for Services that no Service has")
            .step(
                [s(), web("L1")],
                "P>10.96.77.77:80 = DROP; H>10.96.77.77:80 = DROP; X>10.96.77.77:80 = DROP",
            )
            .done(),
        case("P144", "the same where no ServiceCIDR is known")
            .without_service_cidr()
            .step([s(), web("L1")], "P>10.96.77.77:80 = PASS; P>CIP = L1")
            .done(),
        case("P145", "a clusterIP does not answer ping")
            .step([s(), web("L1")], "P>10.96.0.10/ping = REJECT; X>10.96.0.10/ping = REJECT")
            .done(),
        case("P146", "other ports of external addresses are not ours")
            .step(
                [s_lb(), web("L1")],
                "X>198.18.5.5:81 = PASS
                 X>198.18.9.9:22 = PASS
                 X>192.0.2.10:31099 = PASS
                 P>198.18.5.5:81 = PASS
                 P>198.18.9.9:22 = PASS
                 P>192.0.2.10:31099 = PASS",
            )
            .done(),
        case("P147", "the slice is deleted and made again")
            .step([s(), web("L1")], "P>CIP = L1")
            .step([s()], "P>CIP = REJECT")
            .step([s(), web("L1")], "P>CIP = L1")
            .done(),
        case("P148", "a port that no slice has")
            .step(
                [s().ports("web 80, adm 443"), slice("s1", "web=8080", "L1")],
                "P>CIP = L1; P>10.96.0.10:443 = REJECT",
            )
            .done(),
        case("P149", "no refusal on an address without nodePorts")
            .step(
                [s().node_port()],
                "X>198.51.100.10:31080 = PASS; P>198.51.100.10:31080 = PASS; P>NP = REJECT",
            )
            .done(),
    ]
}
