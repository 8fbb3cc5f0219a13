//! Reasons why an endpoint is in a set or not, as `explain` reports them.

use super::*;
use crate::reconcile::desired::endpoints::Reason;
use crate::reconcile::desired::standings;

/// `Ok` in the set, else the reason why not.
type Judged = Result<(), Reason>;

/// Checks each endpoint of a world with its reasons, cluster set first.
#[track_caller]
fn check(world: &World, want: &[(&str, Judged, Judged)]) {
    let desired = world.desired();
    let found = standings(&desired, world.slices.iter(), &world.context);
    let told: Vec<_> = found[0]
        .iter()
        .map(|one| {
            let &(name, ..) = ENDPOINTS.iter().find(|(_, ip, _)| addr(ip) == one.addr).unwrap();
            (name, one.cluster, one.local)
        })
        .collect();
    assert_eq!(told, want);
}

#[test]
fn every_reason_is_told() {
    use Reason::{HintedForNodes, HintedForZones, NotOnThisNode, NotReady, OthersReady, ServesNoMore};
    let (fit, far) = (Ok(()), Err(NotOnThisNode));
    check(
        &s("L1, L2/sn, R1/st, R2/t"),
        &[
            ("L1", fit, fit),
            ("L2", Err(NotReady), Err(NotReady)),
            ("R1", Err(OthersReady), far),
            ("R2", Err(ServesNoMore), far),
        ],
    );
    // The sets fall back independently.
    check(&s("L1/st, R1"), &[("L1", Err(OthersReady), fit), ("R1", fit, far)]);
    check(&s("L1/st, R1/nr"), &[("L1", fit, fit), ("R1", Err(NotReady), far)]);
    check(&s("L1 z(za), R1 z(zb)"), &[("L1", fit, fit), ("R1", Err(HintedForZones), far)]);
    check(&s("L1 n(n2), R1 n(n1)"), &[("L1", Err(HintedForNodes), fit), ("R1", fit, far)]);
}
