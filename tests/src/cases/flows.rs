//! P170-P180: flows whose endpoints change.
//!
//! Flows of pods are packets here. Sockets that the node sees differ: a connected UDP socket is moved to an endpoint
//! that its Service has now, and packets of a TCP connection are not translated.

use super::Case;
use super::objects::{Object, case, s, s_lb, slice, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    let open = "open x X>198.18.5.5:53/udp = L1:1053; open p P>10.96.0.10:53/udp = L1:1053";
    vec![
        case("P170", "the endpoint of a UDP flow is removed")
            .step([dns(), dns1("L1, R1")], open)
            .step([dns(), dns1("R1")], "say x = R1:1053; say p = R1:1053; say x = R1:1053")
            .done(),
        case("P171", "the endpoint of a UDP flow gets another port")
            .step([dns(), dns1("L1")], open)
            .step([dns(), slice("s1", "dns=2053/udp", "L1")], "say x = L1:2053; say p = L1:2053")
            .done(),
        case("P172", "the endpoint of a UDP flow terminates and still serves")
            .step([dns(), dns1("L1, R1")], open)
            .step(
                [dns(), dns1("L1/st, R1")],
                "say x = L1:1053; say p = L1:1053
                 X>198.18.5.5:53/udp = R1:1053
                 P>10.96.0.10:53/udp = R1:1053",
            )
            .done(),
        case("P173", "the endpoint of a UDP flow is not ready any more")
            .step([dns(), dns1("L1, R1")], open)
            .step([dns(), dns1("L1/nr, R1")], "say x = R1:1053; say p = R1:1053")
            .done(),
        case("P174", "a UDP flow through a nodePort")
            .step(
                [dns(), dns1("L1, R1")],
                "open x X>192.0.2.10:31053/udp = L1:1053; open p P>192.0.2.10:31053/udp = L1:1053",
            )
            .step([dns(), dns1("R1")], "say x = R1:1053; say p = R1:1053")
            .done(),
        case("P175", "a UDP socket is older than the first endpoint")
            .step([dns()], "open x X>198.18.5.5:53/udp = REJECT; open p P>10.96.0.10:53/udp = REJECT")
            .step([dns(), dns1("L1")], "say x = L1:1053; say p = L1:1053")
            .done(),
        // kube-proxy keeps these flows, so their datagrams still go to addresses that another pod may have by then.
        case("P176", "all endpoints of UDP flows are removed")
            .step([dns(), dns1("L1, R1")], open)
            .step([dns()], "say x = REJECT; say p = REJECT; X>198.18.5.5:53/udp = REJECT")
            .step([dns(), dns1("R1")], "say x = R1:1053; say p = R1:1053")
            .done(),
        case("P177", "the endpoint of a TCP connection is removed")
            .step([s_lb(), web("L1, R1")], "open x X>VIP = L1; open p P>CIP = L1; open r X>NP = R1")
            .step(
                [s_lb(), web("R1")],
                "say x = L1; say p = L1; say r = R1; X>VIP = R1; P>CIP = R1; say x = L1; say p = L1",
            )
            .step([dns(), dns1("R1")], "say x = L1; say p = L1; say r = R1")
            .done(),
        case("P178", "the endpoint of an SCTP association is removed")
            .step([sctp(), slice("s1", "web=8080/sctp", "L1, R1")], "open p P>10.96.0.10:80/sctp = L1")
            .step([sctp(), slice("s1", "web=8080/sctp", "R1")], "say p = L1")
            .done(),
        case("P179", "a flow to a port that is no frontend")
            .step([dns(), dns1("L1, R1")], "open x X>198.18.5.5:9999/udp = PASS")
            .step([dns(), dns1("R1")], "say x = PASS")
            .done(),
        case("P180", "UDP flows through every external address")
            .step(
                [dns(), dns1("L1, R1")],
                "open v X>198.18.5.5:53/udp = L1:1053
                 open e X>198.18.9.9:53/udp = L1:1053
                 open w P>198.18.5.5:53/udp = L1:1053
                 open f P>198.18.9.9:53/udp = L1:1053",
            )
            .step([dns(), dns1("R1")], "say v = R1:1053; say e = R1:1053; say w = R1:1053; say f = R1:1053")
            .done(),
    ]
}

/// Returns UDP 53 with nodePort 31053, on port 1053 of the endpoints.
fn dns() -> Object {
    s_lb().ports("dns 53/udp 31053")
}

fn dns1(endpoints: &str) -> Object {
    slice("s1", "dns=1053/udp", endpoints)
}

fn sctp() -> Object {
    s().ports("web 80/sctp")
}
