use std::collections::HashMap;

use proptest::prelude::*;
use proxy_common::abi::proto;
use proxy_common::addr::{Addr, Family};

use super::*;
use crate::reconcile::cluster::{Endpoint, ServicePort, ServiceType, SlicePort};
use crate::reconcile::desired::Budget;

/// A namespace may have ten of everything, a Service six.
const BUDGETS: Budgets = Budgets {
    service: Budget { frontends: 6, endpoints: 6, source_ranges: 6 },
    namespace: Budget { frontends: 10, endpoints: 10, source_ranges: 10 },
};

fn service(namespace: &str, name: &str, created: i64, ports: u16, external_ips: u8) -> Service {
    Service {
        key: ObjectKey::new(namespace, name),
        created,
        service_type: ServiceType::ClusterIp,
        cluster_ips: [Some(Addr::v4([10, 96, 0, 1])), None],
        ports: (1..=ports)
            .map(|number| ServicePort {
                name: number.to_string().into(),
                proto: proto::TCP,
                port: number,
                node_port: 0,
            })
            .collect(),
        external_ips: (0..external_ips).map(|byte| Addr::v4([198, 18, 0, byte])).collect(),
        load_balancer_ips: Vec::new(),
        internal_policy: Default::default(),
        external_policy: Default::default(),
        affinity_seconds: None,
        source_ranges: Vec::new(),
        health_check_node_port: 0,
        problems: Vec::new(),
    }
}

fn slice(name: &str, ports: u16, endpoints: u8) -> Slice {
    Slice {
        key: ObjectKey::new("a", name),
        service: ObjectKey::new("a", "s"),
        family: Family::V4,
        ports: (1..=ports)
            .map(|port| SlicePort { name: port.to_string().into(), proto: proto::TCP, port })
            .collect(),
        endpoints: (0..endpoints)
            .map(|byte| Endpoint {
                addr: Addr::v4([10, 64, 1, byte]),
                ready: true,
                serving: true,
                terminating: false,
                local: false,
                hints: None,
            })
            .collect(),
        trigger_time: None,
        problems: Vec::new(),
    }
}

/// Returns a Service that costs `cost` frontends, at least three.
fn costing(namespace: &str, name: &str, created: i64, cost: u8) -> Service {
    service(namespace, name, created, 1, cost - 3)
}

/// The tenants under test, and the names of the objects that the agent has.
struct Bench {
    tenants: Tenants,
    has: BTreeSet<String>,
}

impl Bench {
    fn new() -> Self {
        Self { tenants: Tenants::new(BUDGETS), has: BTreeSet::new() }
    }

    fn pass(&mut self, change: Change, created: i64) {
        let mut changes = Vec::new();
        self.tenants.pass(change, created, &mut changes);
        for change in changes {
            let told = if let Change::Service(service) = &change {
                self.has.insert(service.key.to_string())
            } else if let Change::ServiceGone(key) = &change {
                self.has.remove(&key.to_string())
            } else {
                panic!("{change:?}")
            };
            assert!(told || !self.has.is_empty(), "told for nothing");
        }
    }

    fn applied(&mut self, service: Service) {
        let created = service.created;
        self.pass(Change::Service(service), created);
    }

    fn gone(&mut self, namespace: &str, name: &str) {
        self.pass(Change::ServiceGone(ObjectKey::new(namespace, name)), i64::MAX);
    }

    fn has(&self) -> Vec<&str> {
        self.has.iter().map(String::as_str).collect()
    }

    fn refused(&self) -> Vec<String> {
        self.tenants.problems().into_iter().map(|problem| problem.object).collect()
    }
}

#[test]
fn objects_count_for_what_they_make_or_for_what_is_kept_of_them() {
    assert_eq!(
        of_service(&service("a", "s", 0, 2, 2), &BUDGETS),
        [6, 0, 0],
        "kept: itself, two ports, three addresses"
    );
    let large = Budgets { service: Budget::DEFAULT, ..Budgets::DEFAULT };
    assert_eq!(of_service(&service("a", "s", 0, 10, 9), &large), [100, 0, 0]);
    let mut ported = service("a", "s", 0, 10, 9);
    ported.ports[0].node_port = 30_000;
    ported.source_ranges = vec![proxy_common::addr::Prefix::new(Addr::ZERO, 0).unwrap(); 7];
    assert_eq!(of_service(&ported, &large), [101, 0, 70]);
    // A Service beyond the budget of one Service is not programmed, but kept.
    assert_eq!(of_service(&service("a", "s", 0, 4, 3), &BUDGETS), [9, 0, 0]);
    assert_eq!(of_service(&service("a", "s", 0, 100, 100), &BUDGETS), [10, 0, 0], "never more than there is");
    assert_eq!(of_service(&service("a", "s", 0, 0, 0), &BUDGETS), [2, 0, 0], "nothing is for nothing");
    assert_eq!(of_slice(&slice("s", 10, 10), &large), [0, 100, 0]);
    assert_eq!(of_slice(&slice("s", 1, 3), &BUDGETS), [0, 5, 0]);
    assert_eq!(of_slice(&slice("s", 3, 2), &BUDGETS), [0, 6, 0]);
    let mut hinted = slice("s", 1, 3);
    let hints =
        crate::reconcile::cluster::Hints { zones: vec!["z".into()], nodes: vec!["n".into(), "m".into()] };
    hinted.endpoints[0].hints = Some(Arc::new(hints));
    assert_eq!(of_slice(&hinted, &BUDGETS), [0, 8, 0]);
}

#[test]
fn the_oldest_are_in_and_others_come_back_when_those_go() {
    let mut bench = Bench::new();
    bench.applied(costing("a", "first", 1, 5));
    bench.applied(costing("a", "second", 2, 5));
    assert_eq!((bench.has(), bench.refused()), (vec!["a/first", "a/second"], vec![]));
    assert!(!bench.tenants.have_changed());
    bench.applied(costing("a", "third", 3, 3));
    assert!(bench.tenants.have_changed());
    let [problem] = &bench.tenants.problems()[..] else { panic!("{:?}", bench.refused()) };
    assert_eq!(
        (&*problem.object, &*problem.reason),
        (
            "Service a/third",
            "with the older ones of its namespace it makes more than the 10 frontends of --max-namespace-frontends: the \
             Service is not served; remove others, or raise the limit"
        )
    );
    // Another namespace has its own budget.
    bench.applied(costing("b", "other", 9, 6));
    assert_eq!(bench.has(), ["a/first", "a/second", "b/other"]);
    // A Service that is older than all others, as a list may bring it, displaces the youngest.
    bench.applied(costing("a", "zero", 0, 3));
    assert_eq!(bench.has(), ["a/first", "a/zero", "b/other"]);
    assert_eq!(bench.refused(), ["Service a/second", "Service a/third"]);
    // A Service that grows displaces the youngest, possibly itself.
    bench.applied(costing("a", "zero", 0, 6));
    assert_eq!((bench.has(), bench.refused().len()), (vec!["a/zero", "b/other"], 3));

    // A Service that is admitted again is fetched, and is there only after it has arrived.
    let now = Instant::now();
    assert_eq!(bench.tenants.next_fetch(now), None);
    bench.gone("a", "zero");
    assert_eq!((bench.has(), bench.refused()), (vec!["b/other"], vec!["Service a/third".to_owned()]));
    let fetched: Vec<_> = std::iter::from_fn(|| bench.tenants.next_fetch(now)).collect();
    let [first, second, third] = ["first", "second", "third"].map(|name| ObjectKey::new("a", name));
    assert_eq!(fetched, [(Kind::Services, first.clone()), (Kind::Services, second.clone())]);
    assert!(!bench.tenants.waits());
    assert!(bench.tenants.is_asked_for(Kind::Services, &first));
    bench.applied(costing("a", "first", 1, 5));
    assert_eq!(bench.has(), ["a/first", "b/other"]);
    // The other Service has gone meanwhile, so its fetched state is out of date.
    bench.gone("a", "second");
    assert!(!bench.tenants.is_asked_for(Kind::Services, &second));
    // A Service that could not be fetched is requested again.
    assert_eq!(bench.tenants.next_fetch(now), Some((Kind::Services, third.clone())));
    bench.tenants.not_fetched(Kind::Services, &third);
    assert!(bench.tenants.waits());
    assert_eq!(bench.tenants.next_fetch(now), Some((Kind::Services, third.clone())));
    // A change of the Service itself brings it, too.
    bench.applied(costing("a", "third", 3, 4));
    assert_eq!((bench.has(), bench.refused()), (vec!["a/first", "a/third", "b/other"], vec![]));
    assert!(!bench.tenants.waits());
    for name in ["first", "third"] {
        bench.gone("a", name);
    }
    bench.gone("b", "other");
    assert!(bench.tenants.shares.is_empty() && bench.has.is_empty() && bench.tenants.missing.is_empty());
}

#[test]
fn so_many_are_named_and_so_many_fetched() {
    let mut bench = Bench::new();
    bench.applied(costing("a", "first", 0, 10));
    for number in 0..100 {
        bench.applied(costing("a", &format!("s{number}"), number + 1, 3));
    }
    bench.applied(costing("b", "first", 0, 10));
    bench.applied(costing("b", "s", 1, 3));
    let refused = bench.refused();
    assert_eq!(refused.len(), NAMED + 1 + 1, "{refused:?}");
    assert_eq!(
        bench.tenants.problems()[NAMED].reason,
        "80 more Services are refused, which are not named here"
    );
    assert_eq!(refused[NAMED + 1], "Service b/s");
    // Somebody makes room and takes it away again.
    let (t0, mut fetched) = (Instant::now(), 0);
    for _ in 0..100 {
        bench.gone("a", "first");
        while let Some((_, key)) = bench.tenants.next_fetch(t0) {
            bench.tenants.not_fetched(Kind::Services, &key);
            fetched += 1;
        }
        bench.applied(costing("a", "first", 0, 10));
    }
    assert_eq!(fetched, FETCHES);
    bench.gone("a", "first");
    bench.gone("b", "first");
    let fetched = std::iter::from_fn(|| bench.tenants.next_fetch(t0)).count();
    assert_eq!(fetched, 1, "that of the other namespace");
    let fetched = std::iter::from_fn(|| bench.tenants.next_fetch(t0 + PER_FETCH)).count();
    assert_eq!(fetched, 1);
}

proptest! {
    /// The admitted objects are those that would be admitted by age, whatever the order of events.
    #[test]
    fn who_is_in_does_not_depend_on_the_order(
        steps in prop::collection::vec((0..12_usize, 0..4_i64, prop::option::weighted(0.8, 3..9_u8)), 1..80)
    ) {
        let mut bench = Bench::new();
        let mut all = HashMap::new();
        for (number, created, cost) in steps {
            let name = format!("s{number:02}");
            match cost {
                Some(cost) => {
                    bench.applied(costing("a", &name, created, cost));
                    all.insert(name, (created, cost));
                }
                None => {
                    bench.gone("a", &name);
                    all.remove(&name);
                }
            }
            let now = Instant::now() + Duration::from_secs(3_600);
            while let Some((_, key)) = bench.tenants.next_fetch(now) {
                let (created, cost) = all[&*key.name];
                bench.applied(costing("a", &key.name, created, cost));
            }
            let mut by_age: Vec<_> = all.iter().map(|(name, (created, cost))| (*created, name, *cost)).collect();
            by_age.sort();
            let mut sum = 0;
            let fitting = by_age.iter().take_while(|(_, _, cost)| {
                sum += cost;
                sum <= 10
            });
            let want: BTreeSet<String> = fitting.map(|(_, name, _)| format!("a/{name}")).collect();
            prop_assert_eq!(&bench.has, &want);
            prop_assert_eq!(bench.refused().len(), all.len() - want.len());
        }
    }
}
