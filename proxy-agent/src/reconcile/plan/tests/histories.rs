//! Random histories of random Services, with crashes at any operation.
//!
//! The same ten thousand histories each time. `PROPTEST_CASES=1000000 PROPTEST_RNG_SEED=2 cargo test -p proxy-agent
//! histories` tries others. A failure prints the smallest history that fails, and its seed is kept in
//! `proptest-regressions`.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use proxy_common::abi::frontend::flags as frontend;

use super::machine::{Grace, Machine, Step};
use super::*;

const NAMES: [&str; 4] = ["s0", "s1", "s2", "s3"];
/// Two ports have the same number, so that a port may be renamed and keep its frontends.
const PORTS: [(&str, u8, u16); 4] = [("dns", UDP, 53), ("http", TCP, 80), ("web", TCP, 80), ("x", TCP, 81)];

/// Generates a port with frontends that other ports and Services may claim, too.
fn any_port() -> impl Strategy<Value = DesiredPort> {
    let flags = prop::sample::select(vec![
        0,
        frontend::NEAR_LOCAL,
        frontend::EXTERNAL | frontend::FAR_LOCAL,
        SOURCE_RANGES,
    ]);
    let frontends = prop::collection::btree_map(0..9_u8, flags, 1..5);
    let flags = prop::sample::select(vec![REMOTE, HERE, HERE, DRAINING, IN_CLUSTER, DRAINING | ON_THIS_NODE]);
    let backends = prop::collection::btree_map(0..7_u8, flags, 0..6);
    let empty_local = prop::sample::select(vec![SlotRange::REJECT, SlotRange::DROP]);
    let affinity = prop::sample::select(vec![0, 0, 10, 20]);
    let ranges = prop::collection::btree_set(0..6_u8, 1..4);
    (0..PORTS.len(), frontends, backends, empty_local, affinity, ranges).prop_map(
        |(port, frontends, backends, empty_local, affinity_seconds, ranges)| {
            let (name, proto, number) = PORTS[port];
            let frontends = frontends.into_iter().map(|(which, flags)| match which {
                0..4 => (exact(which, number, proto), flags),
                4..6 => (node_port(31_000 + u16::from(which), proto), flags),
                _ => (FrontendKey::address(vip(which - 6)), 0),
            });
            let frontends: BTreeMap<FrontendKey, u16> = frontends.collect();
            let guarded = frontends.values().any(|flags| flags & SOURCE_RANGES != 0);
            let source_ranges = ranges.into_iter().filter(|_| guarded).map(range).collect();
            let key = PortKey { service: service(""), port_name: name.into(), proto, family: Family::V4 };
            DesiredPort {
                key,
                frontends: frontends.into_iter().collect(),
                backends: endpoints(&backends.into_iter().collect::<Vec<_>>()),
                empty_local,
                affinity_seconds,
                source_ranges,
            }
        },
    )
}

fn any_wanted() -> impl Strategy<Value = Wanted> {
    (0..3_i64, prop::collection::vec(any_port(), 0..3)).prop_map(|(created, ports)| {
        let ports: BTreeMap<PortKey, DesiredPort> =
            ports.into_iter().map(|port| (port.key.clone(), port)).collect();
        let desired = DesiredService { ports: ports.into_values().collect(), problems: Vec::new() };
        Wanted { created, desired }
    })
}

fn any_change() -> impl Strategy<Value = (ObjectKey, Option<Wanted>)> {
    (prop::sample::select(NAMES.to_vec()), prop::option::weighted(0.8, any_wanted())).prop_map(
        |(name, mut wanted)| {
            for port in wanted.iter_mut().flat_map(|wanted| &mut wanted.desired.ports) {
                port.key.service = service(name);
            }
            (service(name), wanted)
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    let crashes = prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(any::<u8>(), 1..4)];
    let grace = prop::sample::select(vec![Grace::Nothing, Grace::Begins, Grace::Ends]);
    let changes = prop::collection::vec(any_change(), 1..4);
    (changes, crashes, grace).prop_map(|(mut changes, crashes, grace)| {
        // The last change of a Service counts.
        changes.reverse();
        changes.sort_by(|(a, _), (b, _)| a.cmp(b));
        changes.dedup_by(|(a, _), (b, _)| a == b);
        Step { changes, crashes, grace }
    })
}

fn histories() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 10_000;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(1);
    }
    config
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn any_prefix_of_any_plan_is_safe_and_a_restart_converges(steps in prop::collection::vec(any_step(), 1..12)) {
        let mut machine = Machine::new(ROOMY);
        for step in &steps {
            machine.step(step);
            prop_assert_eq!(&machine.refused, &BTreeSet::new(), "everything fits");
        }
        machine.settle();
        machine.clear();
    }

    #[test]
    fn full_maps_cost_nobody_else_and_lose_nothing_until_they_grow(
        steps in prop::collection::vec(any_step(), 1..12),
        frontends in 4..20_u32,
        services in 2..8_u32,
        slots in 4..40_u32,
        backends in 4..30_u32,
        source_ranges in 2..16_u32,
    ) {
        let mut machine = Machine::new(Capacity { frontends, services, slots, backends, source_ranges });
        for step in &steps {
            machine.step(step);
        }
        machine.grow(ROOMY);
        prop_assert_eq!(&machine.refused, &BTreeSet::new(), "everything fits");
        machine.settle();
        machine.clear();
    }
}
