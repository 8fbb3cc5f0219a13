//! Foreign changes of the maps are noticed, named, and repaired by a full plan.

use proxy_common::abi::maps;
use proxy_common::abi::{Backend, ServiceId};

use super::*;
use crate::reconcile::drift::Difference;

fn differences(model: &Model, contents: &Contents) -> Vec<Difference> {
    crate::reconcile::drift::differences(model, contents, &filter_words(contents))
}

/// A foreign change.
type Hand = fn(&mut Contents);

#[test]
fn whatever_is_changed_is_named_and_mended() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[
        ("one", web("one", 1, &[(1, HERE), (2, IN_CLUSTER | SERVING)])),
        ("two", guarded("two", 2, &[1])),
    ]);
    let good = bench.sim.contents();
    assert_eq!(differences(&bench.model, &good), []);
    let filter = filter_words(&good);
    let last = filter.iter().rposition(|word| *word != 0).unwrap();
    for kept in [0, last] {
        let found = crate::reconcile::drift::differences(&bench.model, &good, &filter[..kept]);
        assert!(
            matches!(&found[..], [one] if one.map == maps::FILTER && one.what.contains("not set")),
            "{found:?}"
        );
    }

    let hands: [(Hand, &str, &str); 14] = [
        (|c| c.frontends.truncate(1), maps::FRONTENDS, "is missing"),
        (|c| c.frontends[0].1.flags ^= 1, maps::FRONTENDS, "another value"),
        (|c| c.frontends.push((exact(9, 9, UDP), c.frontends[0].1)), maps::FRONTENDS, "should not be there"),
        (|c| c.names.truncate(1), maps::NAMES, "is missing"),
        (|c| c.names[0].1.proto = UDP, maps::NAMES, "another value"),
        (|c| c.names.push((ServiceId(77), c.names[0].1)), maps::NAMES, "should not be there"),
        (|c| c.services.last_mut().unwrap().affinity.seconds = 7, maps::SERVICES, "another affinity"),
        (|c| c.slots.last_mut().unwrap().0 ^= 1, maps::SLOTS, "other backends"),
        (|c| c.backends.last_mut().unwrap().addr = vip(99), maps::BACKENDS, "another address"),
        (
            |c| *c.backends.last_mut().unwrap() = Backend::default(),
            maps::BACKENDS,
            "another address or state",
        ),
        (|c| c.backends.truncate(1), maps::BACKENDS, "is missing"),
        (|c| c.source_ranges.clear(), maps::SOURCE_RANGES, "is missing"),
        (|c| c.service_cidrs.push(range(1)), maps::SERVICE_CIDRS, "should not be there"),
        (|c| c.node_flags = 1, maps::NODE, "0x1"),
    ];
    for (number, (hand, map, what)) in hands.into_iter().enumerate() {
        let mut contents = good.clone();
        hand(&mut contents);
        let found = differences(&bench.model, &contents);
        assert!(
            found.iter().any(|difference| difference.map == map && difference.what.contains(what)),
            "{number}: {found:?}"
        );
        // Nothing else is reported, except in another map that refers to the same element.
        assert!(
            found.iter().all(|difference| difference.map == map || map == maps::BACKENDS),
            "{number}: {found:?}"
        );
        if map == maps::NODE || map == maps::SERVICE_CIDRS {
            continue;
        }
        // A full plan restores everything, possibly under another id.
        let mut model = Model::restore(ROOMY, &contents);
        let all = everything(&model, &bench.services);
        let ops = plan(&mut model, &all, true).ops;
        assert!(!ops.is_empty(), "{number}");
        assert!(model.frontends.keys().eq(bench.model.frontends.keys()), "{number}");
        assert!(!differences(&model, &contents).is_empty(), "{number}: as `verify` sees it");
    }
}

#[test]
fn differences_have_the_names_of_services() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("one", web("one", 1, &[(1, HERE)]))]);
    let mut contents = bench.sim.contents();
    contents.frontends.retain(|(key, _)| *key != exact(1, 80, TCP));
    let found: Vec<String> = differences(&bench.model, &contents).iter().map(ToString::to_string).collect();
    assert_eq!(found, ["FRONTENDS: 10.96.0.1:80/TCP of a/one TCP IPv4: is missing"]);
}
