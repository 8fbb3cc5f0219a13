//! Each map is too small once: only the Service that does not fit is refused, keeps its previous state, and is
//! programmed as soon as there is room.

use proxy_common::abi::maps;

use super::*;

/// Checks that `s` and `t` fit, and that the change of `s` to `more` does not, until `t` is gone.
#[track_caller]
fn check(capacity: Capacity, s: Option<Wanted>, t: Option<Wanted>, more: Option<Wanted>, reason: &str) {
    let mut bench = Bench::new(capacity);
    bench.becomes(&[("s", s)]);
    bench.becomes(&[("t", t)]);
    let before = bench.sim.contents();

    let plan = bench.change(&[("s", more.clone()), ("v", None)]);
    let reasons = plan.refused.get(&service("s")).expect("refused");
    assert!(reasons.iter().all(|text| text.contains(reason)), "{reasons:?}");
    assert_eq!(plan.refused.len(), 1);
    account(&bench.model, &plan.freed);
    let after = bench.sim.contents();
    let (before, mut after) = (read(&before), read(&after));
    if reason.contains(maps::FRONTENDS) {
        // The frontends that fit are there.
        after.frontends.retain(|key, _| before.frontends.contains_key(key));
    }
    assert_eq!(after, before, "what it had is what it has");

    // Other Services still change.
    let plan = bench.change(&[("t", None), ("s", more.clone())]);
    assert_eq!(plan.refused.len(), 1, "what others free waits for a grace period");
    bench.model.release(plan.freed);
    bench.becomes(&[("s", more)]);
}

#[test]
fn backends() {
    let capacity = Capacity { backends: 4, ..ROOMY };
    let more = web("s", 10, &[(1, REMOTE), (2, REMOTE), (3, REMOTE)]);
    check(
        capacity,
        web("s", 10, &[(1, REMOTE)]),
        web("t", 11, &[(2, REMOTE)]),
        more,
        "map BACKENDS is full: 2 more",
    );
}

#[test]
fn slots() {
    // Three slots for the old sets, three for the new sets beside them.
    let capacity = Capacity { slots: 7, ..ROOMY };
    let more = web("s", 10, &[(1, REMOTE), (2, REMOTE), (3, REMOTE), (4, REMOTE)]);
    let s = web("s", 10, &[(1, REMOTE)]);
    check(capacity, s.clone(), web("t", 11, &[(2, REMOTE), (3, REMOTE)]), more, "map SLOTS is full: 4 more");
    // The local set does not fit: the range for the cluster set is given back.
    let more = web("s", 10, &[(1, HERE), (2, HERE)]);
    check(capacity, s, web("t", 11, &[(2, REMOTE), (3, REMOTE)]), more, "map SLOTS is full: 2 more");
}

#[test]
fn services() {
    let capacity = Capacity { services: 3, ..ROOMY };
    let tcp = port("s", TCP, &[exact(10, 80, TCP)], &[(1, HERE)]);
    let udp = port("s", UDP, &[exact(10, 80, UDP)], &[(1, HERE)]);
    let (one, both) = (wanted(1, vec![tcp.clone()]), wanted(1, vec![tcp, udp]));
    check(capacity, one, web("t", 11, &[(2, REMOTE)]), both, "map SERVICES is full");
}

#[test]
fn source_ranges() {
    // An unwanted range takes its place until the frontends have changed.
    let capacity = Capacity { source_ranges: 4, ..ROOMY };
    check(
        capacity,
        guarded("s", 10, &[1]),
        guarded("t", 11, &[1, 2]),
        guarded("s", 10, &[2, 3]),
        "map SOURCE_RANGES is full: 2 more needed, 1 free",
    );
}

#[test]
fn frontends() {
    let capacity = Capacity { frontends: 5, ..ROOMY };
    let more = [exact(10, 80, TCP), exact(12, 80, TCP), exact(13, 80, TCP), FrontendKey::address(vip(10))];
    let more = wanted(1, vec![port("s", TCP, &more, &[(1, HERE)])]);
    let (s, t) = (web("s", 10, &[(1, HERE)]), web("t", 11, &[(2, HERE)]));
    check(capacity, s, t, more, "map FRONTENDS is full: 1 more needed");
}

#[test]
fn a_full_map_is_not_overfilled_by_what_takes_the_place_of_others() {
    // The order of keys puts the old address first, the order of operations the new one.
    let mut bench = Bench::new(Capacity { frontends: 2, ..ROOMY });
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)]))]);
    let moved = web("s", 11, &[(1, HERE)]);
    let plan = bench.change(&[("s", moved.clone())]);
    assert_eq!(outline(&plan), ["-address 10.96.0.10", "-10.96.0.10:80/TCP"]);
    assert!(plan.refused.contains_key(&service("s")));
    bench.becomes(&[("s", moved)]);
}
