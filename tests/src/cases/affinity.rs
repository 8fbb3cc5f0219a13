//! P160-P169: session affinity.

use serde_json::json;

use super::Case;
use super::objects::{Object, case, s, slice, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P160", "one client stays with one endpoint")
            .step([sticky(s(), 10_800), three()], "P>CIP = sticky L1, R1, R2 @ 20x0s")
            .done(),
        case("P161", "many clients are spread, each stays")
            .step([sticky(s(), 10_800), three()], "Pods>CIP = sticky L1, R1, R2 @ 5x0s")
            .done(),
        case("P162", "a client is forgotten after the timeout")
            .step([sticky(s(), 10), web("L1, R1")], "P>CIP = L1, R1 @ 20x15s")
            .done(),
        case("P163", "every connection begins the timeout anew")
            .step([sticky(s(), 10), web("L1, R1")], "P>CIP = sticky L1, R1 @ 11x6s")
            .done(),
        case("P164", "the remembered endpoint is removed")
            .step([sticky(s(), 10_800), web("R1")], "P>CIP = R1")
            .step([sticky(s(), 10_800), web("L1, R1")], "P>CIP = sticky R1 @ 10x0s")
            .step([sticky(s(), 10_800), web("L1")], "P>CIP = L1")
            .done(),
        case("P165", "affinity off and on again")
            .step([sticky(s(), 10_800), three()], "P>CIP = sticky L1, R1, R2 @ 30x0s")
            .step([s(), three()], "P>CIP = L1, R1, R2 @ 30x0s")
            .step([sticky(s(), 10_800), three()], "P>CIP = sticky L1, R1, R2 @ 30x0s")
            .done(),
        case("P166", "affinity through a nodePort")
            .step(
                [sticky(s().node_port(), 10_800), web("L1, R1")],
                "X>NP = sticky L1, R1 masq @ 10x0s; P>NP = sticky L1, R1 masq @ 10x0s",
            )
            .done(),
        case("P167", "every port has a memory of its own")
            .step(
                [sticky(s().ports("web 80, adm 443"), 10_800), slice("s1", "web=8080, adm=8443", "L1, R1")],
                "P>CIP = sticky L1, R1 @ 10x0s; P>10.96.0.10:443 = sticky L1:8443, R1:8443 @ 10x0s",
            )
            .done(),
        case("P168", "affinity of datagrams")
            .step(
                [sticky(s().ports("web 80/udp"), 10_800), slice("s1", "web=8080/udp", "L1, R1")],
                "P>CIP/udp = sticky L1, R1 @ 20x0s",
            )
            .done(),
        case("P169", "affinity without a configuration")
            .step(
                [s().spec("sessionAffinity", "ClientIP"), web("L1, R1")],
                "affinity CIP = 10800; P>CIP = sticky L1, R1 @ 10x0s",
            )
            .done(),
    ]
}

fn three() -> Object {
    web("L1, R1, R2")
}

fn sticky(service: Object, seconds: u32) -> Object {
    service
        .spec("sessionAffinity", "ClientIP")
        .spec("sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } }))
}
