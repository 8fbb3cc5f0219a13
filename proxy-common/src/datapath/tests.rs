//! Tests that need hardly any tables: reads that race with the agent, and the arithmetic of the pick. The
//! socket edge is tested in `proxy-agent`, whose simulator is filled by the agent's own map operations.

use core::cell::{Cell, RefCell};
use std::collections::VecDeque;

use proptest::prelude::*;

use super::edge::timeouts::{expired, lifetime};
use super::lookup::{Target, find};
use super::select::{Client, Selection, select};
use super::tables::{Tables, Tier, since};
use crate::abi::backend::flags::IN_CLUSTER;
use crate::abi::frontend::flags::{DENY_HOST, DENY_POD, FAR_LOCAL, NEAR_LOCAL, POD_LOCAL};
use crate::abi::{
    AffinityKey, AffinityValue, Backend, BackendId, BackendState, CgroupId, Counter, Event, Flow,
    FrontendKey, FrontendValue, Nanos, NetnsCookie, Node, Service, ServiceId, Slot, SlotRange, StreamRecord,
    StreamSlot, Trace, UdpFlow, UdpFlowKey, local_address, proto,
};
use crate::addr::Addr;
use crate::be::Be16;

const VIP: Addr = Addr::v4([10, 96, 0, 10]);
const PORT: Be16 = Be16::new(80);

/// Tables whose answers change between two reads. No map of a test does that by itself.
#[derive(Default)]
struct Racing {
    /// Results of the reads of `FRONTENDS`, one after the other; nothing when they are used up.
    frontends: RefCell<VecDeque<Option<FrontendValue>>>,
    asked: RefCell<Vec<FrontendKey>>,
    local: u32,
    in_cidr: bool,
    service: Option<Service>,
    random: u32,
    slot_asked: Cell<Option<u32>>,
}

impl Tables for Racing {
    fn filter(&self, _: u32) -> u64 {
        u64::MAX
    }

    fn stream(&self, _: StreamSlot) -> Option<StreamRecord> {
        None
    }

    fn put_stream(&self, _: StreamSlot, _: &StreamRecord) -> bool {
        false
    }

    fn free_stream(&self, _: StreamSlot) {}

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.asked.borrow_mut().push(*key);
        self.frontends.borrow_mut().pop_front().flatten()
    }

    fn service(&self, _: ServiceId) -> Option<Service> {
        self.service
    }

    fn slot(&self, slot: Slot) -> Option<BackendId> {
        self.slot_asked.set(Some(slot.0));
        Some(BackendId(7))
    }

    fn backend(&self, _: BackendId) -> Option<Backend> {
        let state = BackendState { flags: IN_CLUSTER, generation: 1 };
        Some(Backend { service: ServiceId(3), state, ..Backend::default() })
    }

    fn local_address(&self, _: &Addr) -> u32 {
        self.local
    }

    fn in_service_cidr(&self, _: &Addr) -> bool {
        self.in_cidr
    }

    fn node(&self) -> Node {
        Node::default()
    }

    fn opted_out(&self, _cgroup: CgroupId) -> u32 {
        0
    }

    fn is_sandbox(&self, _netns: NetnsCookie) -> bool {
        false
    }

    fn learn_host_netns(&self, _: NetnsCookie) {}

    fn affinity(&self, _: Tier, _: &AffinityKey) -> Option<AffinityValue> {
        None
    }

    fn remember(&self, _: Tier, _: &AffinityKey, _: &AffinityValue) {}

    fn udp_flow(&self, _: &UdpFlowKey) -> Option<UdpFlow> {
        None
    }

    fn drop_udp_flow(&self, _: &UdpFlowKey) {}
    fn put_udp_flow(&self, _: &UdpFlowKey, _: &UdpFlow) -> bool {
        true
    }

    fn count(&self, _: Counter) {}

    fn random(&self) -> u32 {
        self.random
    }

    fn now(&self) -> Nanos {
        Nanos(0)
    }

    fn trace(&self) -> Trace {
        Trace::default()
    }

    fn tell(&self, _: impl FnOnce() -> Event) {}
}

#[test]
fn a_reused_element_is_read_once_more() {
    let key = FrontendKey::exact(VIP, PORT, proto::TCP);
    let own = FrontendValue::new(&key, ServiceId(1), 0);
    let other = FrontendValue::new(&FrontendKey::exact(VIP, Be16::new(81), proto::TCP), ServiceId(2), 0);
    let reads: [(&[Option<FrontendValue>], Target, usize); 5] = [
        (&[Some(own)], Target::Frontend(own), 1),
        (&[Some(other), Some(own)], Target::Frontend(own), 2),
        (&[Some(other), Some(other), Some(own)], Target::Retry, 2),
        // The element was removed between the reads: the lookup goes on as if it had never been there.
        (&[Some(other), None], Target::Other, 3),
        (&[None], Target::Other, 2),
    ];
    for (answers, target, count) in reads {
        let tables =
            Racing { frontends: RefCell::new(answers.iter().copied().collect()), ..Racing::default() };
        assert_eq!(find(&tables, &VIP, PORT, proto::TCP), target, "{answers:?}");
        assert_eq!(tables.asked.borrow().len(), count, "{answers:?}");
    }
}

#[test]
fn a_reused_node_port_element_is_read_once_more() {
    let key = FrontendKey::node_port(Addr::v4([0; 4]), PORT, proto::TCP);
    let (own, other) = (
        FrontendValue::new(&key, ServiceId(1), 0),
        FrontendValue { service: ServiceId(2), flags: 0, check: !key.check() },
    );
    for (second, target) in [(own, Target::Frontend(own)), (other, Target::Retry)] {
        let answers = [None, Some(other), Some(second)];
        let tables = Racing {
            frontends: RefCell::new(answers.into()),
            local: local_address::HOST | local_address::NODEPORT,
            in_cidr: true,
            ..Racing::default()
        };
        assert_eq!(find(&tables, &VIP, PORT, proto::TCP), target);
        assert_eq!(tables.asked.borrow()[1..], [key, key]);
    }
}

#[test]
fn an_active_cluster_ip_comes_before_the_cidr() {
    let any = FrontendValue { service: ServiceId::NONE, flags: 0, check: 0 };
    const HOST: u32 = local_address::HOST;
    for (address, in_cidr, local, target) in [
        (Some(any), true, 0, Target::UnusedPort),
        (Some(any), true, HOST, Target::UnusedPort),
        (Some(any), false, HOST, Target::UnusedPort),
        (None, true, 0, Target::InactiveAddress),
        // The host has the address, so a process may listen there.
        (None, true, HOST, Target::Other),
        (None, false, HOST, Target::Other),
    ] {
        let answers = RefCell::new(VecDeque::from([None, address]));
        let tables = Racing { frontends: answers, in_cidr, local, ..Racing::default() };
        assert_eq!(find(&tables, &VIP, PORT, proto::TCP), target);
        assert_eq!(tables.asked.borrow()[1], FrontendKey::address(VIP));
    }
}

#[test]
fn nobody_is_refused_by_one_miss() {
    let key = FrontendKey::exact(VIP, PORT, proto::TCP);
    let own = FrontendValue::new(&key, ServiceId(1), 0);
    for (address, in_cidr) in [(Some(own), true), (None, true)] {
        let answers = RefCell::new(VecDeque::from([None, address, Some(own)]));
        let tables = Racing { frontends: answers, in_cidr, ..Racing::default() };
        assert_eq!(find(&tables, &VIP, PORT, proto::TCP), Target::Frontend(own));
        assert_eq!(tables.asked.borrow()[2], key);
    }
}

#[test]
fn each_client_has_its_own_flags() {
    let cluster = SlotRange { base: 100, len: 1 };
    let local = SlotRange { base: 200, len: 1 };
    let service = Some(Service { cluster, local, affinity: Default::default() });
    let chosen = |flags: u16, client: Client| {
        let tables = Racing { service, ..Racing::default() };
        let selection =
            select(&tables, FrontendValue { service: ServiceId(3), flags, check: 0 }, client, VIP);
        if !matches!(selection, Selection::Backend(BackendId(7), _)) {
            assert_eq!(selection, Selection::Drop(Counter::DropSourceRange));
        }
        tables.slot_asked.get()
    };
    let clients = [Client::Host, Client::Pod, Client::Near, Client::Far];
    let (c, l) = (Some(100), Some(200));
    for (flags, sets) in [
        (0, [c, c, c, c]),
        (NEAR_LOCAL, [l, c, l, c]),
        (POD_LOCAL, [c, l, c, c]),
        (FAR_LOCAL, [c, c, c, l]),
        (DENY_HOST, [None, c, c, c]),
        (DENY_POD | NEAR_LOCAL, [l, None, l, c]),
    ] {
        assert_eq!(clients.map(|client| chosen(flags, client)), sets, "{flags:#x}");
    }
}

#[test]
fn an_index_outside_of_the_map_is_dropped() {
    let tables = Racing::default();
    let frontend = FrontendValue { service: ServiceId(u32::MAX), flags: 0, check: 0 };
    assert_eq!(select(&tables, frontend, Client::Pod, VIP), Selection::Drop(Counter::DropRetry));
}

proptest! {
    /// Holds for every uptime, and also for times before the boot.
    #[test]
    fn time_passes_alike_on_every_machine(
        any in 0..1_u64 << 62,
        passed in 0..1_u64 << 50,
        state in 0..1_u32 << 8,
        proto in prop_oneof![Just(proto::TCP), Just(proto::UDP), Just(proto::SCTP)],
    ) {
        let lifetime = lifetime(proto, state);
        for now in [0, 1_000_000_000, 3_600_000_000_000, any] {
            for passed in [0, passed, lifetime - 1, lifetime, lifetime + 1] {
                let last_seen = Nanos(now.wrapping_sub(passed));
                prop_assert_eq!(since(last_seen, Nanos(now)), passed);
                // The clocks of two CPUs differ.
                prop_assert_eq!(since(Nanos(now + passed), Nanos(now)), 0);
                let flow = Flow { last_seen, state, ..Flow::default() };
                prop_assert_eq!(expired(&flow, proto, Nanos(now)), passed >= lifetime);
            }
        }
    }

    #[test]
    fn a_pick_stays_in_its_range(random: u32, base in 1..1_000_000_u32, len in 1..1_000_000_u32) {
        for random in [0, 1, random, u32::MAX - 1, u32::MAX] {
            let cluster = SlotRange { base, len };
            let service = Some(Service { cluster, ..Service::default() });
            let tables = Racing { service, random, ..Racing::default() };
            let frontend = FrontendValue { service: ServiceId(3), flags: 0, check: 0 };
            let picked = matches!(select(&tables, frontend, Client::Far, VIP), Selection::Backend(BackendId(7), _));
            prop_assert!(picked);
            let slot = tables.slot_asked.get().unwrap();
            prop_assert!((base..base + len).contains(&slot), "{}", slot);
            // The ends of the random numbers are the ends of the range.
            prop_assert!(random != 0 || slot == base);
            prop_assert!(random != u32::MAX || slot == base + len - 1);
        }
    }

    #[test]
    fn every_slot_gets_its_share_of_the_random_numbers(len in 1..64_u32) {
        // The random numbers are spread evenly, the same number for each slot: the shares differ by one at
        // most.
        let each = 1000;
        let count = u64::from(len) * each;
        let mut shares = vec![0_u64; len as usize];
        for i in 0..count {
            let random = u32::try_from((i << 32) / count).unwrap();
            let service = Some(Service { cluster: SlotRange { base: 0, len }, ..Service::default() });
            let tables = Racing { service, random, ..Racing::default() };
            select(&tables, FrontendValue { service: ServiceId(3), flags: 0, check: 0 }, Client::Far, VIP);
            shares[tables.slot_asked.get().unwrap() as usize] += 1;
        }
        prop_assert!(shares.iter().all(|share| share.abs_diff(each) <= 1), "{:?}", shares);
    }
}
