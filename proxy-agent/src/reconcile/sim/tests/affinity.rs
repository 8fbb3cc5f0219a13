//! `sessionAffinity: ClientIP` at the socket edge.

use proxy_common::abi::{BackendId, NetnsCookie, ServiceId};

use super::*;

const TIMEOUT: u32 = 10;

fn sticky() -> Simulator {
    let mut sim = world();
    set_service(&mut sim, |service| service.affinity.seconds = TIMEOUT);
    sim
}

fn connect_from(sim: &Simulator, netns: NetnsCookie) -> BackendId {
    let mut socket = SimSocket { netns, ..socket(vip(10), 80, TCP) };
    assert_eq!(connect(&mut socket, sim), Translated);
    backend_of(&socket)
}

/// Checks whether the affinity entry of a client counts after `change`: an entry that counts must lead to the same
/// backend again and again.
#[track_caller]
fn check(change: impl Fn(&mut Simulator, BackendId), hits: bool, counts_stale: bool) {
    // A wrong entry may lead to the right backend by chance, so many clients are tried.
    let mut moved = 0;
    for netns in 1000..1040 {
        let mut sim = sticky();
        let first = connect_from(&sim, NetnsCookie(netns));
        change(&mut sim, first);
        let hits_before = sim.counted(Counter::AffinityHit);
        moved += u32::from(connect_from(&sim, NetnsCookie(netns)) != first);
        assert_eq!(sim.counted(Counter::AffinityHit) - hits_before, u64::from(hits));
        assert_eq!(sim.counted(Counter::AffinityStale), u64::from(counts_stale));
        // The backend that the client got is remembered from here on.
        let second = connect_from(&sim, NetnsCookie(netns));
        assert_eq!(connect_from(&sim, NetnsCookie(netns)), second);
    }
    assert_eq!(moved == 0, hits, "{moved} of 40 moved");
}

#[test]
fn a_client_returns_to_its_backend_while_all_is_as_it_was() {
    check(|_, _| {}, true, false);
    check(|sim, _| sim.clock.set(sim.clock.get() + u64::from(TIMEOUT) * SECOND - 1), true, false);
    // Neither another client, nor another backend that drains, nor the loss of `SERVING` ends the affinity.
    check(
        |sim, _| {
            connect_from(sim, NetnsCookie(7));
        },
        true,
        false,
    );
    check(|sim, first| set_backend(sim, BackendId(first.0 % 3 + 1), SERVING, 9), true, false);
    check(|sim, first| set_backend(sim, first, IN_CLUSTER, 5), true, false);
}

#[test]
fn a_memory_ends_with_the_second_the_epoch_the_generation_the_set_or_the_owner() {
    check(|sim, _| sim.clock.set(sim.clock.get() + u64::from(TIMEOUT) * SECOND), false, false);
    check(|sim, _| set_service(sim, |service| service.affinity.epoch += 1), false, false);
    check(|sim, first| set_backend(sim, first, IN_CLUSTER | SERVING, 6), false, true);
    check(
        |sim, first| {
            let state = BackendState { flags: SERVING | IN_LOCAL, generation: 5 };
            sim.apply(&Op::BackendState(first, state)).unwrap();
            let rest: Vec<_> = (1..=3).map(BackendId).filter(|id| *id != first).collect();
            sim.apply(&Op::Slots(30, rest)).unwrap();
            set_service(sim, |service| service.cluster = SlotRange { base: 30, len: 2 });
        },
        false,
        true,
    );
    check(
        |sim, first| {
            let stranger = Backend { service: ServiceId(2), ..sim.backend(first).unwrap() };
            sim.apply(&Op::Backend(first, stranger)).unwrap();
            let rest: Vec<_> = (1..=3).map(BackendId).filter(|id| *id != first).collect();
            sim.apply(&Op::Slots(30, rest)).unwrap();
            set_service(sim, |service| service.cluster = SlotRange { base: 30, len: 2 });
        },
        false,
        true,
    );
}

#[test]
fn each_connection_starts_the_time_anew_and_only_in_its_own_set() {
    let mut sim = sticky();
    let first = connect_from(&sim, POD_NETNS);
    for _ in 0..5 {
        sim.clock.set(sim.clock.get() + u64::from(TIMEOUT) * SECOND - 1);
        assert_eq!(connect_from(&sim, POD_NETNS), first);
    }
    // The entry of a remote endpoint does not count if only the local endpoint is in the set.
    let remote = (2000..).find(|netns| connect_from(&sim, NetnsCookie(*netns)) != BackendId(1)).unwrap();
    frontend(&mut sim, exact(vip(10), 80, TCP), ServiceId(1), POD_LOCAL);
    assert_eq!(connect_from(&sim, NetnsCookie(remote)), BackendId(1));
    frontend(&mut sim, exact(vip(10), 80, TCP), ServiceId(1), 0);
    assert_eq!(connect_from(&sim, NetnsCookie(remote)), BackendId(1), "remembered anew");
}

#[test]
fn clients_are_told_apart_by_their_namespace_and_only_remembered_where_asked() {
    let sim = sticky();
    let backends: BTreeSet<BackendId> = (0..40).map(|netns| connect_from(&sim, NetnsCookie(netns))).collect();
    assert_eq!(backends, BTreeSet::from([1, 2, 3].map(BackendId)));
    let sim = world();
    connect_from(&sim, POD_NETNS);
    let key = AffinityKey { client: AffinityKey::netns_client(POD_NETNS), service: ServiceId(1) };
    assert!(sim.clients.borrow().is_empty() && sim.new_clients.borrow().is_empty());
    // The client id of a namespace is an address that no client can have.
    assert_eq!(key.client.to_ip().to_string(), "100::4d");
}

#[test]
fn a_clock_that_went_backwards_forgets_nobody() {
    let sim = sticky();
    sim.clock.set(100 * SECOND);
    let first = connect_from(&sim, POD_NETNS);
    sim.clock.set(1);
    assert_eq!(connect_from(&sim, POD_NETNS), first);
}
