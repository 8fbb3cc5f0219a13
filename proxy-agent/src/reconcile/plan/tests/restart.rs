//! Restart of an agent on the maps that the old agent left behind.

use proxy_common::abi::{BackendState, FrontendValue, ServiceId};

use super::*;
use crate::reconcile::model::service_name;

/// Returns a Service with two endpoints. The plan to replace one of them has been carried out up to the first
/// operation that `stop` accepts.
fn interrupted(stop: impl Fn(&Op) -> bool) -> Bench {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, HERE)])), ("t", web("t", 11, &[(3, REMOTE)]))]);
    let changed = web("s", 10, &[(1, HERE), (4, HERE)]);
    let plan = plan(&mut bench.model, &BTreeMap::from([(service("s"), changed.clone())]), false);
    bench.services.extend(changed.map(|wanted| (service("s"), wanted)));
    for op in plan.ops.iter().take_while(|op| !stop(op)) {
        bench.sim.apply(op).unwrap();
    }
    bench
}

#[test]
fn sets_that_are_still_offered_are_not_written_over() {
    let mut bench = interrupted(|op| matches!(op, Op::Service(..)));
    let offered = bench.element("s").cluster;
    // Another Service wants slots at the same time, and is planned first.
    let another = web("a", 12, &[(5, REMOTE), (6, REMOTE)]).unwrap();
    bench.services.insert(service("a"), another);
    let plan = bench.restart();
    for op in &plan.ops {
        if let Op::Slots(base, ids) = op {
            let end = base + u32::try_from(ids.len()).unwrap();
            assert!(
                end <= offered.base || offered.base + offered.len <= *base,
                "{op:?} writes into {offered:?}"
            );
        }
    }
    assert!(plan.freed.ranges.contains(&offered), "{:?}", plan.freed);
    assert_eq!(read(&bench.sim.contents()), ought(&bench.services));
    account(&bench.model, &plan.freed);
}

#[test]
fn a_service_that_is_gone_gives_back_what_it_still_offered() {
    let mut bench = interrupted(|op| matches!(op, Op::Service(..)));
    bench.services.clear();
    let plan = bench.restart();
    assert_eq!(read(&bench.sim.contents()), Meaning::default());
    bench.model.release(plan.freed);
    assert_eq!(bench.model.slots.available(), ROOMY.slots - 1);
}

#[test]
fn backends_that_nobody_offers_yet_or_any_more_are_found() {
    for stop in ["slots", "nothing"] {
        let mut bench = interrupted(|op| {
            let dies = matches!(op, Op::BackendState(_, state) if state.flags == 0);
            dies || stop == "slots" && matches!(op, Op::Slots(..))
        });
        let plan = bench.restart();
        assert_eq!(read(&bench.sim.contents()), ought(&bench.services));
        account(&bench.model, &plan.freed);
    }
}

#[test]
fn a_name_without_anything_behind_it_is_found() {
    let mut bench = Bench::new(ROOMY);
    let key = port("s", TCP, &[], &[]).key;
    bench.sim.apply(&Op::Name(ServiceId(1), Some(Box::new(service_name(&key))))).unwrap();
    let plan = bench.restart();
    assert_eq!(outline(&plan), ["service", "-name"]);
    account(&bench.model, &plan.freed);
}

#[test]
fn what_nobody_claims_is_removed_by_a_full_plan_only() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)])), ("t", web("t", 11, &[]))]);
    let stray = exact(12, 80, TCP);
    bench.sim.apply(&Op::Frontend(stray, Some(FrontendValue::new(&stray, ServiceId(2), 0)))).unwrap();
    bench.model = Model::restore(ROOMY, &bench.sim.contents());
    let services = BTreeMap::from([(service("s"), web("s", 10, &[(1, HERE)]))]);
    let partial = plan(&mut bench.model.clone(), &services, false);
    assert_eq!(partial.ops, Vec::new());
    assert_eq!(outline(&bench.restart()), ["-10.96.0.12:80/TCP"]);
    assert_eq!(read(&bench.sim.contents()), ought(&bench.services));
}

#[test]
fn a_service_that_does_not_fit_after_a_restart_keeps_what_it_had() {
    let capacity = Capacity { backends: 3, ..ROOMY };
    let mut bench = Bench::new(capacity);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, HERE)]))]);
    let before = read(&bench.sim.contents());
    bench
        .services
        .extend(web("s", 10, &[(1, HERE), (2, HERE), (3, HERE)]).map(|wanted| (service("s"), wanted)));
    let plan = bench.restart();
    assert!(plan.refused.contains_key(&service("s")));
    assert_eq!(plan.ops, Vec::new());
    assert_eq!(read(&bench.sim.contents()), before);
}

#[test]
fn a_service_whose_ranges_do_not_fit_after_a_restart_keeps_what_it_had() {
    let mut bench = Bench::new(Capacity { source_ranges: 2, ..ROOMY });
    bench.becomes(&[("s", guarded("s", 10, &[])), ("t", guarded("t", 11, &[1]))]);
    let before = read(&bench.sim.contents());
    bench.services.insert(service("s"), guarded("s", 10, &[1, 2]).unwrap());
    let plan = bench.restart();
    assert!(plan.refused.contains_key(&service("s")));
    assert_eq!(plan.ops, Vec::new());
    assert_eq!(read(&bench.sim.contents()), before);
}

#[test]
fn maps_that_do_not_fit_together_are_put_in_order() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)])), ("t", web("t", 11, &[(2, REMOTE)]))]);
    let (s, t) = (bench.id("s"), bench.id("t"));
    let damage = [
        // Two Services with one range, a range that reaches beyond the map, a backend without a Service, a dead
        // backend in a set, a second id with the same name, an invalid name, a frontend that leads to no Service.
        Op::Service(s, bench.element("t")),
        Op::Service(
            ServiceId(40),
            Service { cluster: SlotRange { base: u32::MAX, len: 9 }, ..bench.element("s") },
        ),
        Op::Name(ServiceId(40), Some(Box::new(service_name(&port("x", TCP, &[], &[]).key)))),
        Op::BackendState(bench.backend("t", 2).0, BackendState { flags: 0, generation: 7 }),
        Op::Name(ServiceId(41), Some(Box::new(service_name(&port("s", TCP, &[], &[]).key)))),
        Op::Name(ServiceId(42), Some(Box::new(bytemuck::Zeroable::zeroed()))),
        // Source ranges without a Service, one of them at the id that the next Service gets.
        Op::SourceRange(ServiceId(3), range(1), true),
        Op::SourceRange(ServiceId(41), range(1), true),
        Op::Frontend(exact(9, 9, TCP), Some(FrontendValue::new(&exact(9, 9, TCP), ServiceId(55), 0))),
    ];
    for op in &damage {
        bench.sim.apply(op).unwrap();
    }
    bench.services.insert(service("a"), guarded("a", 12, &[2]).unwrap());
    let plan = bench.restart();
    assert_eq!(plan.refused, BTreeMap::new());
    assert_eq!(read(&bench.sim.contents()), ought(&bench.services));
    assert_eq!(bench.id("a"), ServiceId(3));
    assert_eq!((bench.id("s"), bench.id("t")), (s, t));
    account(&bench.model, &plan.freed);
    assert_eq!(bench.restart().ops, Vec::new());
}
