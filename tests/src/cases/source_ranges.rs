//! P150-P158: `loadBalancerSourceRanges`.

use serde_json::json;

use super::Case;
use super::objects::{Object, case, s_lb, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P150", "one client in range, one not")
            .step(lb(clients()), "X>VIP = L1 masq; Y>VIP = DROP")
            .done(),
        case("P151", "the ranges are about the load-balancer address alone")
            .step(lb(clients()), "Y>NP = L1 masq; Y>EXT = L1 masq; P>CIP = L1 keep; P>NP = L1; P>EXT = L1")
            .done(),
        case("P152", "pods and the host need to be in range, too")
            .step(lb(clients()), "P>VIP = DROP; H>VIP = DROP; Q>VIP = DROP")
            .done(),
        case("P153", "the host is in range")
            .step(lb(ranges(&["192.0.2.0/24"])), "H>VIP = L1 masq; P>VIP = DROP")
            .done(),
        case("P154", "white space around a range")
            .step(lb(ranges(&["  203.0.113.0/25 "])), "X>VIP = L1 masq; Y>VIP = DROP; P>VIP = DROP")
            .done(),
        case("P155", "everybody is in range")
            .step(
                lb(ranges(&["203.0.113.0/25", "0.0.0.0/0"])),
                "Y>VIP = L1 masq; P>VIP = L1 masq; H>VIP = L1",
            )
            .done(),
        case("P156", "some pods are in range")
            .step(lb(ranges(&["10.64.1.0/24"])), "P>VIP = L1 masq; X>VIP = DROP; H>VIP = DROP; Q>VIP = DROP")
            .done(),
        case("P157", "the ranges are taken away")
            .step(lb(clients()), "Y>VIP = DROP; P>VIP = DROP")
            .step(lb(s_lb()), "Y>VIP = L1 masq; P>VIP = L1 masq")
            .done(),
        case("P158", "ranges hold for every load-balancer address")
            .step(
                lb(clients().ingress(json!([{ "ip": "198.18.5.5" }, { "ip": "198.18.5.7" }]))),
                "Y>198.18.5.7:80 = DROP; P>198.18.5.7:80 = DROP; X>198.18.5.7:80 = L1",
            )
            .done(),
    ]
}

fn ranges(ranges: &[&'static str]) -> Object {
    s_lb().spec("loadBalancerSourceRanges", ranges.to_vec())
}

fn clients() -> Object {
    ranges(&["203.0.113.0/25"])
}

fn lb(service: Object) -> [Object; 2] {
    [service, web("L1")]
}
