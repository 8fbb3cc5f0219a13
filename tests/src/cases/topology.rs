//! P100-P114: topology hints.

use super::Case;
use super::objects::{Object, ZONE, case, node, s, s_lb, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case("P100", "endpoints for our zone").step([s(), hinted()], "P>CIP = L1, R2; H>CIP = L1, R2").done(),
        case("P101", "one endpoint without a hint switches hints off")
            .step([s(), web("L1 z(za), R1, R2 z(za)")], "P>CIP = L1, R1, R2")
            .done(),
        case("P102", "no endpoint for our zone").step([s(), web("R1 z(zb)")], "P>CIP = R1").done(),
        case("P103", "a node without a zone").step([nowhere(), s(), hinted()], "P>CIP = L1, R1, R2").done(),
        case("P104", "a node with an empty zone")
            .step([n1_in(""), s(), hinted()], "P>CIP = L1, R1, R2")
            .done(),
        case("P105", "the only endpoint for our zone is not ready")
            .step([s(), web("L1/nr z(za), R1 z(zb), R2 z(zb)")], "P>CIP = R1, R2")
            .done(),
        case("P106", "endpoints for several zones")
            .step([s(), web("L1 z(za,zb), R1 z(zb,zc), R2 z(zc,za)")], "P>CIP = L1, R2")
            .done(),
        case("P107", "the hint for our node comes first")
            .step([s(), web("L1 z(za) n(n1), R1 z(zb) n(n2), R2 z(za) n(n3)")], "P>CIP = L1")
            .done(),
        case("P108", "no endpoint for our node, but for our zone")
            .step([s(), web("R1 z(zb) n(n2), R2 z(za) n(n3)")], "P>CIP = R2")
            .done(),
        case("P109", "one endpoint without a hint switches both modes off")
            .step([s(), web("L1 z(za) n(n1), R1, R2 z(za) n(n3)")], "P>CIP = L1, R1, R2")
            .done(),
        case("P110", "hints narrow the cluster set only")
            .step(
                [s_lb().external_local(), web("L1 z(zb), L2 z(za), R1 z(zb), R2 z(za)")],
                "X>VIP = L1, L2 keep; P>VIP = L2, R2 keep; P>CIP = L2, R2 keep",
            )
            .done(),
        case("P111", "the local set ignores hints")
            .step([s().internal_local(), web("L1 z(zb), L2 z(za), R2 z(za)")], "P>CIP = L1, L2")
            .done(),
        case("P112", "a preference without hints")
            .step([s().spec("trafficDistribution", "PreferSameZone"), web("L1, R1")], "P>CIP = L1, R1")
            .done(),
        case("P113", "hints without a preference")
            .step([s(), web("L1 z(za), R1 z(zb)")], "P>CIP = L1")
            .done(),
        case("P114", "the node moves to other zones")
            .step([s(), hinted()], "P>CIP = L1, R2")
            .step([n1_in("zb"), s(), hinted()], "P>CIP = R1")
            .step([n1_in("zc"), s(), hinted()], "P>CIP = L1, R1, R2")
            .done(),
    ]
}

fn hinted() -> Object {
    web("L1 z(za), R1 z(zb), R2 z(za)")
}

fn n1_in(zone: &str) -> Object {
    node("n1").label(ZONE, zone)
}

/// Returns n1 without a zone label.
fn nowhere() -> Object {
    node("n1").edit(|node| {
        let labels = node["metadata"]["labels"].as_object_mut();
        labels.expect("labels of a node").remove(ZONE);
    })
}
