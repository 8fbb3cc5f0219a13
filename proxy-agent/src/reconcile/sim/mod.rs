//! The maps as ordered maps, without a kernel: the effect of a plan on them, and the decisions of the datapath from
//! them. Tests fill them by plans, [`crate::commands::explain`] from the pinned maps.
//!
//! The simulator carries out the same operations that the kernel maps get ([`MapStore`]), and the same code reads it
//! that the BPF programs are made of ([`Tables`]).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::{
    AffinityKey, AffinityValue, Backend, BackendId, CgroupId, Counter, Event, FrontendKey, FrontendValue,
    Nanos, NetnsCookie, Node, Service, ServiceId, ServiceName, Slot, SocketRecord, StreamRecord, StreamSlot,
    Trace, UdpFlow, UdpFlowKey, socket::Order,
};
use proxy_common::addr::{Addr, Prefix};
use proxy_common::be::Be16;
use proxy_common::datapath::socket;
use proxy_common::datapath::tables::{Socket, Tables, Tier};

use crate::reconcile::store::{Contents, MapStore, Op, StoreError, filter_bits};

pub mod frame;

pub(crate) mod edge;

pub(crate) mod edge_maps;

#[cfg(test)]
mod tests;

/// Map contents, a clock and a source of randomness.
#[derive(Debug, Default)]
pub struct Simulator {
    names: BTreeMap<ServiceId, ServiceName>,
    filter: BTreeMap<u32, u64>,
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    services: BTreeMap<u32, Service>,
    slots: BTreeMap<u32, BackendId>,
    backends: BTreeMap<u32, Backend>,
    local_addresses: BTreeMap<Addr, u32>,
    source_ranges: BTreeSet<(ServiceId, Prefix)>,
    service_cidrs: BTreeSet<Prefix>,
    pod_sources: BTreeSet<Prefix>,
    opt_out: BTreeMap<CgroupId, u32>,
    sandboxes: BTreeMap<NetnsCookie, CgroupId>,
    node_flags: u64,
    /// `AFFINITY`.
    pub clients: RefCell<BTreeMap<AffinityKey, AffinityValue>>,
    /// `NEW_AFFINITY`.
    pub new_clients: RefCell<BTreeMap<AffinityKey, AffinityValue>>,
    streams: RefCell<BTreeMap<StreamSlot, StreamRecord>>,
    udp_flows: RefCell<BTreeMap<UdpFlowKey, UdpFlow>>,
    counters: RefCell<BTreeMap<Counter, u64>>,
    random: Cell<u64>,
    /// Value that the source of randomness yields each time, in place of its own sequence.
    pub fixed_random: Cell<Option<u32>>,
    /// The packet edge's own maps.
    pub edge: edge_maps::EdgeMaps,
    /// The monotonic clock, in nanoseconds.
    pub clock: Cell<u64>,
    /// Cookie of the host's network namespace.
    pub host_netns: Cell<NetnsCookie>,
    /// `TRACE`: the events that observers want.
    pub(crate) trace: Cell<Trace>,
    /// Events that the datapath has reported.
    pub(crate) events: RefCell<Vec<Event>>,
    /// Number of entries of `UDP_FLOWS` that can still be written; `None` for any number.
    pub(crate) udp_flow_room: Cell<Option<u32>>,
}

impl Simulator {
    /// Creates maps with these contents. `filter` holds the words of `FILTER`.
    pub fn of(contents: &Contents, filter: &[u64]) -> Self {
        fn array<T: Copy>(elements: &[T]) -> BTreeMap<u32, T> {
            (0..).zip(elements.iter().copied()).collect()
        }
        Self {
            names: contents.names.iter().copied().collect(),
            filter: array(filter),
            frontends: contents.frontends.iter().copied().collect(),
            services: array(&contents.services),
            slots: array(&contents.slots),
            backends: array(&contents.backends),
            local_addresses: contents.local_addresses.iter().copied().collect(),
            source_ranges: contents.source_ranges.iter().copied().collect(),
            service_cidrs: contents.service_cidrs.iter().copied().collect(),
            pod_sources: contents.pod_sources.iter().copied().collect(),
            opt_out: contents.opt_out.iter().copied().collect(),
            sandboxes: contents.sandboxes.iter().copied().collect(),
            node_flags: contents.node_flags,
            ..Self::default()
        }
    }

    /// Returns the contents as an agent would read them back. Arrays end at the last element ever written.
    pub fn contents(&self) -> Contents {
        fn array<T: Copy + Default>(elements: &BTreeMap<u32, T>) -> Vec<T> {
            let len = elements.last_key_value().map_or(0, |(last, _)| last + 1);
            (0..len).map(|index| elements.get(&index).copied().unwrap_or_default()).collect()
        }
        Contents {
            names: self.names.iter().map(|(id, name)| (*id, *name)).collect(),
            frontends: self.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            services: array(&self.services),
            slots: array(&self.slots),
            backends: array(&self.backends),
            local_addresses: self.local_addresses.iter().map(|(addr, bits)| (*addr, *bits)).collect(),
            source_ranges: self.source_ranges.iter().copied().collect(),
            service_cidrs: self.service_cidrs.iter().copied().collect(),
            pod_sources: self.pod_sources.iter().copied().collect(),
            opt_out: self.opt_out.iter().map(|(cgroup, what)| (*cgroup, *what)).collect(),
            sandboxes: self.sandboxes.iter().map(|(netns, cgroup)| (*netns, *cgroup)).collect(),
            node_flags: self.node_flags,
        }
    }

    /// Removes an entry of `UDP_FLOWS`, as the LRU may at any time.
    pub(crate) fn evict_udp_flow(&self, key: &UdpFlowKey) -> Option<UdpFlow> {
        self.udp_flows.borrow_mut().remove(key)
    }

    fn remembered(&self, tier: Tier) -> &RefCell<BTreeMap<AffinityKey, AffinityValue>> {
        match tier {
            Tier::Assured => &self.clients,
            Tier::New => &self.new_clients,
        }
    }

    /// Returns how often the datapath counted `counter`.
    pub fn counted(&self, counter: Counter) -> u64 {
        self.counters.borrow().get(&counter).copied().unwrap_or(0)
    }
}

impl MapStore for Simulator {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        fn set<K: Ord + Copy, V: Clone>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        fn put<T: Ord>(set: &mut BTreeSet<T>, element: T, present: bool) {
            if present {
                set.insert(element);
            } else {
                set.remove(&element);
            }
        }
        for bit in filter_bits(op) {
            *self.filter.entry(bit.word).or_default() |= bit.mask;
        }
        match op {
            Op::Name(id, name) => {
                if name.is_some() {
                    self.edge.forget_counters(*id);
                }
                set(&mut self.names, *id, name.as_deref().copied());
            }
            Op::Backend(id, backend) => set(&mut self.backends, id.0, Some(*backend)),
            Op::BackendState(id, state) => self.backends.entry(id.0).or_default().state = *state,
            Op::Slots(base, ids) => self.slots.extend((*base..).zip(ids.iter().copied())),
            Op::Service(id, service) => set(&mut self.services, id.0, Some(*service)),
            Op::Frontend(key, value) => set(&mut self.frontends, *key, *value),
            Op::LocalAddress(addr, bits) => set(&mut self.local_addresses, *addr, *bits),
            Op::SourceRange(id, range, present) => put(&mut self.source_ranges, (*id, *range), *present),
            Op::ServiceCidr(cidr, present) => put(&mut self.service_cidrs, *cidr, *present),
            Op::PodSource(pods, present) => put(&mut self.pod_sources, *pods, *present),
            Op::OptOut(cgroup, what) => set(&mut self.opt_out, *cgroup, *what),
            Op::Sandbox(netns, cgroup) => set(&mut self.sandboxes, *netns, *cgroup),
            Op::NodeFlags(flags) => self.node_flags = *flags,
        }
        Ok(())
    }
}

impl Tables for Simulator {
    fn filter(&self, word: u32) -> u64 {
        self.filter.get(&word).copied().unwrap_or(0)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }

    fn service(&self, id: ServiceId) -> Option<Service> {
        // As in an array, an element that was never written is zero.
        Some(self.services.get(&id.0).copied().unwrap_or_default())
    }

    fn slot(&self, slot: Slot) -> Option<BackendId> {
        Some(self.slots.get(&slot.0).copied().unwrap_or_default())
    }

    fn backend(&self, id: BackendId) -> Option<Backend> {
        Some(self.backends.get(&id.0).copied().unwrap_or_default())
    }

    fn local_address(&self, addr: &Addr) -> u32 {
        self.local_addresses.get(addr).copied().unwrap_or(0)
    }

    fn in_service_cidr(&self, addr: &Addr) -> bool {
        self.service_cidrs.iter().any(|cidr| cidr.contains(*addr))
    }

    fn node(&self) -> Node {
        Node { host_netns: self.host_netns.get(), flags: self.node_flags }
    }

    fn opted_out(&self, cgroup: CgroupId) -> u32 {
        self.opt_out.get(&cgroup).copied().unwrap_or(0)
    }

    fn is_sandbox(&self, netns: NetnsCookie) -> bool {
        self.sandboxes.contains_key(&netns)
    }

    fn learn_host_netns(&self, cookie: NetnsCookie) {
        self.host_netns.set(cookie);
    }

    fn affinity(&self, tier: Tier, key: &AffinityKey) -> Option<AffinityValue> {
        self.remembered(tier).borrow().get(key).copied()
    }

    fn remember(&self, tier: Tier, key: &AffinityKey, value: &AffinityValue) {
        self.remembered(tier).borrow_mut().insert(*key, *value);
    }

    fn stream(&self, slot: StreamSlot) -> Option<StreamRecord> {
        Some(self.streams.borrow().get(&slot).copied().unwrap_or_default())
    }

    fn put_stream(&self, slot: StreamSlot, stream: &StreamRecord) -> bool {
        self.streams.borrow_mut().insert(slot, *stream);
        true
    }

    fn free_stream(&self, slot: StreamSlot) {
        self.streams.borrow_mut().remove(&slot);
    }

    fn udp_flow(&self, key: &UdpFlowKey) -> Option<UdpFlow> {
        self.udp_flows.borrow().get(key).copied()
    }

    fn put_udp_flow(&self, key: &UdpFlowKey, flow: &UdpFlow) -> bool {
        match self.udp_flow_room.get() {
            Some(0) => return false,
            Some(room) => self.udp_flow_room.set(Some(room - 1)),
            None => {}
        }
        self.udp_flows.borrow_mut().insert(*key, *flow);
        true
    }

    fn drop_udp_flow(&self, key: &UdpFlowKey) {
        self.evict_udp_flow(key);
    }

    fn count(&self, counter: Counter) {
        *self.counters.borrow_mut().entry(counter).or_default() += 1;
    }

    fn random(&self) -> u32 {
        if let Some(fixed) = self.fixed_random.get() {
            return fixed;
        }
        // SplitMix64 (Steele, Lea, Flood 2014): the same sequence in every run.
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 32) as u32
    }

    fn now(&self) -> Nanos {
        Nanos(self.clock.get())
    }

    fn trace(&self) -> Trace {
        self.trace.get()
    }

    fn tell(&self, make: impl FnOnce() -> Event) {
        self.events.borrow_mut().push(make());
    }
}

/// A socket for [`Simulator`], in the place of the context of a cgroup hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimSocket<'a> {
    /// Peer address.
    pub addr: Addr,
    /// Peer port.
    pub port: Be16,
    /// Peer of the socket in the kernel; port 0 if it is not connected.
    pub peer: (Addr, Be16),
    /// IP protocol number as the kernel has it.
    pub protocol: u32,
    /// Socket cookie.
    pub cookie: u64,
    /// Cookie of the network namespace.
    pub netns: NetnsCookie,
    /// Ids of the cgroups that the process is in, the outermost first.
    pub cgroups: &'a [CgroupId],
    /// Record in the socket storage.
    pub record: Option<SocketRecord>,
    /// The agent's order for the socket.
    pub order: Option<Order>,
    /// Whether writing the socket storage fails.
    pub storage_fails: bool,
}

impl Socket for SimSocket<'_> {
    fn addr(&self) -> Addr {
        self.addr
    }

    fn port(&self) -> Be16 {
        self.port
    }

    fn peer(&self) -> (Addr, Be16) {
        self.peer
    }

    fn protocol(&self) -> u32 {
        self.protocol
    }

    fn cookie(&self) -> u64 {
        self.cookie
    }

    fn netns(&self) -> NetnsCookie {
        self.netns
    }

    fn cgroup(&self, level: i32) -> CgroupId {
        let index = usize::try_from(level - 1);
        index.ok().and_then(|index| self.cgroups.get(index)).copied().unwrap_or(CgroupId::NONE)
    }

    fn rewrite(&mut self, addr: Addr, port: Be16) {
        (self.addr, self.port) = (addr, port);
    }

    fn record(&self) -> Option<SocketRecord> {
        self.record
    }

    fn put_record(&mut self, record: SocketRecord) -> bool {
        if !self.storage_fails {
            self.record = Some(record);
        }
        !self.storage_fails
    }

    fn drop_record(&mut self) {
        self.record = None;
    }

    fn order(&self) -> Option<Order> {
        self.order
    }

    fn drop_order(&mut self) {
        self.order = None;
    }

    fn is_of_opt_out(&self, tables: &impl Tables, inside: bool) -> bool {
        socket::is_of_opt_out(|level| self.cgroup(level), tables, inside)
    }
}
