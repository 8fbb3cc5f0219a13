//! P120-P130: source addresses that endpoints see.

use super::objects::{Builder, case, lb_local, s, s_lb, web};
use super::{Case, DetectLocal};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    let by_interface =
        "P>VIP = L1, R1 keep; P>CIP = L1, R1 keep; Q>NP = L1 keep; X>VIP = L1 keep; H>CIP = L1, R1 masq";
    vec![
        case("P120", "sources through a clusterIP")
            .step(
                [s(), web("L1, R1")],
                "P>CIP = L1, R1 keep; X>CIP = L1, R1 masq; H>CIP = L1, R1 masq; Q>CIP = L1, R1 keep",
            )
            .done(),
        case("P121", "a pod reaches itself")
            .step([s(), web("L1")], "L1>CIP = L1 masq")
            .step([s_lb().external_local(), web("L1")], "L1>VIP = L1 masq; L1>CIP = L1 masq")
            .done(),
        everybody_is_masqueraded("P122", "masquerading everybody changes what is served in nothing")
            .step([s(), web("L1, R1")], "P>CIP = L1, R1 masq")
            .done(),
        everybody_is_masqueraded("P123", "masquerading everybody concerns clusterIPs only")
            .step([lb_local(), web("L1")], "X>VIP = L1 keep; P>VIP = L1 keep")
            .done(),
        anybody_may_be_a_pod("P124", "sources through a clusterIP without detect-local")
            .step([s(), web("L1")], "X>CIP = L1 keep; H>CIP = L1 keep; P>CIP = L1 keep")
            .done(),
        anybody_may_be_a_pod("P125", "sources through external addresses without detect-local")
            .step([s_lb(), web("L1")], "X>VIP = L1 masq; P>NP = L1 masq")
            .done(),
        case("P126", "the internal policy has no say in sources")
            .step([s().internal_local(), web("L1")], "H>CIP = L1 masq; X>CIP = L1 masq")
            .done(),
        case("P127", "pods are what comes from a bridge")
            .config(|config| config.detect_local = DetectLocal::Bridge("cni0"))
            .step([lb_local(), web("L1, R1")], by_interface)
            .done(),
        case("P128", "pods are what comes from interfaces with a prefix")
            .config(|config| config.detect_local = DetectLocal::Prefix("veth"))
            .step([lb_local(), web("L1, R1")], by_interface)
            .done(),
        case("P129", "a pod's own address is not ours")
            .step([s(), web("L1")], "P>10.64.1.11:8080 = PASS")
            .done(),
        case("P130", "replies come from the clusterIP").step([s(), web("R1")], "P>CIP = R1 keep").done(),
    ]
}

fn anybody_may_be_a_pod(id: &'static str, title: &'static str) -> Builder {
    case(id, title).config(|config| config.cluster_cidr.clear())
}

fn everybody_is_masqueraded(id: &'static str, title: &'static str) -> Builder {
    case(id, title).config(|config| config.masquerade_all = true)
}
