//! P070-P095: terminating endpoints, and the internal and external traffic policies.

use super::Case;
use super::objects::{Object, case, lb_local, s, s_lb, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P070", "ready before terminating").step([s(), web("L1, R1/st")], "P>CIP = L1").done(),
        case("P071", "terminating and serving when none is ready")
            .step([s(), web("L1/st, R1/st, R2/t")], "P>CIP = L1, R1")
            .done(),
        case("P072", "terminating and not serving")
            .step([s(), web("L1/t, R1/t")], "P>CIP = REJECT; H>CIP = REJECT")
            .done(),
        case("P073", "serving, but neither ready nor terminating")
            .step([s(), web("L1/sn")], "P>CIP = REJECT")
            .done(),
        case("P074", "internal policy Local")
            .step([internal(), web("L1, L2, R1")], "P>CIP = L1, L2 keep; H>CIP = L1, L2")
            .done(),
        case("P075", "internal policy Local without a local endpoint")
            .step([internal(), web("R1, R2")], "P>CIP = DROP; H>CIP = DROP")
            .done(),
        case("P076", "a local terminating endpoint before a remote ready one")
            .step([internal(), web("L1/st, R1")], "P>CIP = L1")
            .done(),
        case("P077", "the only local endpoint does not serve any more")
            .step([internal(), web("L1/t, R1")], "P>CIP = DROP")
            .done(),
        case("P078", "no endpoint serves anywhere")
            .step([internal(), web("L1/t, R1/t")], "P>CIP = REJECT")
            .done(),
        case("P079", "the internal policy does not touch external frontends")
            .step(
                [s_lb().internal_local(), web("L1, R1")],
                "P>VIP = L1, R1 masq; X>NP = L1, R1 masq; P>NP = L1, R1 masq",
            )
            .done(),
        case("P080", "external policy Local, far clients")
            .step([lb_local(), web("L1, R1")], "X>VIP = L1 keep; X>EXT = L1 keep; X>NP = L1 keep")
            .done(),
        case("P081", "external policy Local, pods")
            .step(
                [lb_local(), web("L1, R1")],
                "P>VIP = L1, R1 keep; P>EXT = L1, R1 keep; P>NP = L1, R1 keep; Q>NP = L1, R1 keep",
            )
            .done(),
        case("P082", "external policy Local, the host")
            .step([lb_local(), web("L1, R1")], "H>VIP = L1, R1 masq; H>NP = L1, R1 masq")
            .done(),
        case("P083", "the external policy does not touch the clusterIP")
            .step([lb_local(), web("L1, R1")], "X>CIP = L1, R1 masq; P>CIP = L1, R1 keep")
            .done(),
        case("P084", "external policy Local without a local endpoint")
            .step([lb_local(), web("R1")], "X>VIP = DROP; P>VIP = R1 keep; H>VIP = R1 masq; Q>VIP = R1 keep")
            .done(),
        case("P085", "the same on the nodePort")
            .step([lb_local(), web("R1")], "X>NP = DROP; P>NP = R1 keep; H>NP = R1")
            .done(),
        case("P086", "the local set falls back by itself")
            .step([lb_local(), web("L1/st, L2/st, R1")], "X>VIP = L1, L2 keep; P>CIP = R1 keep; P>VIP = R1")
            .done(),
        case("P087", "a local ready endpoint before a local terminating one")
            .step([lb_local(), web("L1, L2/st, R1")], "X>VIP = L1 keep; P>VIP = L1, R1")
            .done(),
        case("P088", "the only endpoint is remote and terminates")
            .step([lb_local(), web("R1/st")], "X>VIP = DROP; P>CIP = R1 keep; P>VIP = R1")
            .done(),
        case("P089", "no endpoint serves")
            .step([lb_local(), web("L1/t, R1/t")], "X>VIP = REJECT; P>CIP = REJECT; P>VIP = REJECT")
            .done(),
        case("P090", "both policies Local, the endpoint is remote")
            .step(
                [s_lb().internal_local().external_local(), web("R1")],
                "P>CIP = DROP; X>VIP = DROP; P>VIP = R1 keep",
            )
            .done(),
        case("P091", "an external policy that means nothing")
            .step([s().external_local(), web("L1, R1")], "P>CIP = L1, R1")
            .done(),
        case("P092", "external policy Local with externalIPs alone")
            .step(
                [s().spec("externalIPs", vec!["198.18.9.9"]).external_local(), web("L1, R1")],
                "X>EXT = L1 keep; P>EXT = L1, R1",
            )
            .done(),
        case("P093", "external policy Cluster falls back everywhere")
            .step([s_lb(), web("L1/st, R1/st")], "X>VIP = L1, R1 masq; P>VIP = L1, R1 masq")
            .done(),
        case("P094", "a terminating endpoint gives way to a ready one")
            .step([lb_local(), web("L1/st, L2/st, R1")], "X>VIP = L1, L2 keep; P>VIP = R1")
            .step([lb_local(), web("L1/st, L2, R1")], "X>VIP = L2 keep; P>VIP = L2, R1")
            .done(),
        case("P095", "external policy Local without detect-local")
            .config(|config| config.cluster_cidr.clear())
            .step(
                [lb_local(), web("L1, R1")],
                "P>VIP = L1 keep; P>NP = L1 keep; H>VIP = L1, R1 masq; H>NP = L1, R1",
            )
            .done(),
    ]
}

fn internal() -> Object {
    s().internal_local()
}
