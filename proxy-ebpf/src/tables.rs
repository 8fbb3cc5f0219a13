//! The maps as the datapath reads and writes them.

use core::ptr::read_volatile;

use aya_ebpf::btf_maps::lpm_trie;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use proxy_common::abi::{
    AffinityKey, AffinityValue, Backend, BackendId, CgroupId, Counter, Device, Event, Flow, FlowKey, FlowRef,
    FragmentKey, FragmentPorts, FrontendKey, FrontendValue, IfIndex, Nanos, NetnsCookie, Node, Service,
    ServiceId, Slot, StreamRecord, StreamSlot, Trace, UdpFlow, UdpFlowKey,
};
use proxy_common::addr::Addr;
use proxy_common::datapath::edge::tables::EdgeTables;
use proxy_common::datapath::edge::work::Work;
use proxy_common::datapath::tables::{Tables, Tier};

use crate::cell::Cell;
use crate::maps::{
    AFFINITY, BACKENDS, BPF_ANY, BPF_NOEXIST, COARSE_CLOCK, COUNTERS, DEVICES, EVENTS, FILTER, FLOW_INDEX,
    FLOWS, FRAGMENTS, FRONTENDS, LOCAL_ADDRESSES, Maps, NEW_AFFINITY, NEW_FLOW_INDEX, NEW_FLOWS, NODE,
    OPT_OUT, POD_SOURCES, SANDBOXES, SERVICE_CIDRS, SERVICE_COUNTERS, SERVICES, SLOTS, SOURCE_RANGES,
    STREAMS, SourceRange, TRACE, UDP_FLOWS,
};
use crate::steps;

/// Loads a value of one or more aligned 64-bit words word by word, each exactly once: the agent stores whole words.
macro_rules! load_words {
    ($ptr:expr, $t:ty, $n:literal) => {{
        const { assert!(size_of::<$t>() == $n * 8 && align_of::<$t>() == 8) };
        let words = $ptr.cast::<u64>();
        let mut copy = [0u64; $n];
        let mut i = 0;
        while i < $n {
            // SAFETY: the kernel's lookup returned a pointer to a whole `$t`, which has `$n` aligned words.
            copy[i] = unsafe { read_volatile(words.add(i)) };
            i += 1;
        }
        bytemuck::cast::<[u64; $n], $t>(copy)
    }};
}

impl Tables for Maps {
    #[inline(always)]
    fn filter(&self, word: u32) -> u64 {
        match FILTER.get_ptr(word) {
            // SAFETY: the kernel's lookup returned a pointer to a whole element.
            Some(bits) => unsafe { read_volatile(bits) },
            // Never happens, but the verifier does not know that the index is in range.
            None => u64::MAX,
        }
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        Some(load_words!(FRONTENDS.get_ptr(key)?, FrontendValue, 1))
    }

    #[inline(always)]
    fn service(&self, id: ServiceId) -> Option<Service> {
        Some(load_words!(SERVICES.get_ptr(id.0)?, Service, 3))
    }

    #[inline(always)]
    fn slot(&self, slot: Slot) -> Option<BackendId> {
        let slot = SLOTS.get_ptr(slot.0)?;
        // SAFETY: the kernel's lookup returned a pointer to a whole element.
        Some(BackendId(unsafe { read_volatile(slot) }))
    }

    #[inline(always)]
    fn backend(&self, id: BackendId) -> Option<Backend> {
        let backend = BACKENDS.get_ptr(id.0)?;
        // `state` is read first. If it is current, the other words can be trusted: they change only while it is not
        // current.
        let words = backend.cast::<u64>();
        // SAFETY: the kernel's lookup returned a pointer to a whole, aligned element of four words.
        let last = unsafe { words.add(3) };
        // SAFETY: as above.
        let state = unsafe { read_volatile(last) };
        // SAFETY: as above.
        let [a, b, c] = unsafe { read_volatile(words.cast::<[u64; 3]>()) };
        Some(bytemuck::cast::<[u64; 4], Backend>([a, b, c, state]))
    }

    #[inline(always)]
    fn local_address(&self, addr: &Addr) -> u32 {
        // SAFETY: the value is copied at once; the value of a reused element misleads one lookup at worst.
        unsafe { LOCAL_ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn in_service_cidr(&self, addr: &Addr) -> bool {
        SERVICE_CIDRS.get(&lpm_trie::Key::new(128, *addr)).is_some()
    }

    #[inline(always)]
    fn node(&self) -> Node {
        match NODE.get_ptr(0) {
            Some(node) => load_words!(node, Node, 2),
            None => Node { host_netns: NetnsCookie::NONE, flags: 0 },
        }
    }

    #[inline(always)]
    fn opted_out(&self, cgroup: CgroupId) -> u32 {
        // SAFETY: the kernel's lookup returned a pointer to a whole element.
        OPT_OUT.get_ptr(cgroup.0).map_or(0, |what| unsafe { what.read_volatile() })
    }

    #[inline(always)]
    fn is_sandbox(&self, netns: NetnsCookie) -> bool {
        SANDBOXES.get_ptr(netns.0).is_some()
    }

    #[inline(always)]
    fn learn_host_netns(&self, cookie: NetnsCookie) {
        if let Some(node) = NODE.get_ptr_mut(0) {
            // SAFETY: the kernel's lookup returned a pointer to a whole element, which begins with the cookie.
            unsafe { node.cast::<u64>().write_volatile(cookie.0) };
        }
    }

    #[inline(always)]
    fn affinity(&self, tier: Tier, key: &AffinityKey) -> Option<AffinityValue> {
        let value = match tier {
            Tier::Assured => AFFINITY.get_ptr(key),
            Tier::New => NEW_AFFINITY.get_ptr(key),
        }?;
        // SAFETY: copied at once; the copy is checked against the backend that it names.
        Some(unsafe { *value })
    }

    #[inline(always)]
    fn remember(&self, tier: Tier, key: &AffinityKey, value: &AffinityValue) {
        // A full LRU hash evicts. Any other failure leaves the client unremembered, which is allowed.
        let _ = match tier {
            Tier::Assured => AFFINITY.insert(key, value, BPF_ANY),
            Tier::New => NEW_AFFINITY.insert(key, value, BPF_ANY),
        };
    }

    #[inline(always)]
    fn stream(&self, slot: StreamSlot) -> Option<StreamRecord> {
        Some(load_words!(STREAMS.get_ptr(slot.0)?, StreamRecord, 8))
    }

    #[inline(always)]
    fn put_stream(&self, slot: StreamSlot, stream: &StreamRecord) -> bool {
        match STREAMS.get_ptr_mut(slot.0) {
            Some(element) => {
                let words = bytemuck::cast::<StreamRecord, [u64; 8]>(*stream);
                // SAFETY: the kernel's lookup returned a pointer to a whole element of eight aligned words.
                unsafe { element.cast::<[u64; 8]>().write_volatile(words) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn free_stream(&self, slot: StreamSlot) {
        if let Some(element) = STREAMS.get_ptr_mut(slot.0) {
            // SAFETY: the kernel's lookup returned a pointer to a whole element, which begins with the cookie.
            unsafe { element.cast::<u64>().write_volatile(0) };
        }
    }

    #[inline(always)]
    fn udp_flow(&self, key: &UdpFlowKey) -> Option<UdpFlow> {
        // SAFETY: copied at once; the copy carries a digest of key and value.
        unsafe { UDP_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn put_udp_flow(&self, key: &UdpFlowKey, flow: &UdpFlow) -> bool {
        UDP_FLOWS.insert(key, flow, 0).is_ok()
    }

    #[inline(always)]
    fn drop_udp_flow(&self, key: &UdpFlowKey) {
        let _ = UDP_FLOWS.remove(key);
    }

    #[inline(always)]
    fn count(&self, counter: Counter) {
        if let Some(count) = COUNTERS.get_ptr_mut(counter as u32) {
            // SAFETY: a per-CPU element: nobody else writes this CPU's copy while the program runs.
            let count = unsafe { &mut *count };
            *count = count.wrapping_add(1);
        }
    }

    #[inline(always)]
    fn trace(&self) -> Trace {
        match TRACE.get_ptr(0) {
            Some(trace) => load_words!(trace, Trace, 2),
            None => Trace { until: Nanos(0), service: ServiceId::NONE, sample: 0 },
        }
    }

    #[inline(always)]
    fn tell(&self, make: impl FnOnce() -> Event) {
        if let Some(mut event) = EVENTS.reserve_untyped::<Event>(0) {
            event.write(make());
            event.submit(0);
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments or preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> Nanos {
        if COARSE_CLOCK.load() != 0 {
            // SAFETY: a helper without arguments or preconditions.
            Nanos(unsafe { bpf_ktime_get_coarse_ns() })
        } else {
            // SAFETY: as above.
            Nanos(unsafe { bpf_ktime_get_ns() })
        }
    }
}

impl EdgeTables for Maps {
    type Cell = Cell;

    #[inline(always)]
    fn flow(&self, tier: Tier, key: &FlowKey) -> Option<Cell> {
        match tier {
            Tier::Assured => FLOWS.get_ptr_mut(key),
            Tier::New => NEW_FLOWS.get_ptr_mut(key),
        }
        .map(Cell)
    }

    #[inline(always)]
    fn add_flow(&self, tier: Tier, key: &FlowKey, flow: &Flow) -> bool {
        match tier {
            Tier::Assured => FLOWS.insert(key, flow, BPF_NOEXIST),
            Tier::New => NEW_FLOWS.insert(key, flow, BPF_NOEXIST),
        }
        .is_ok()
    }

    #[inline(always)]
    fn remove_flow(&self, tier: Tier, key: &FlowKey) {
        let _ = match tier {
            Tier::Assured => FLOWS.remove(key),
            Tier::New => NEW_FLOWS.remove(key),
        };
    }

    #[inline(always)]
    fn index(&self, tier: Tier, key: &FlowKey) -> Option<FlowRef> {
        let target = match tier {
            Tier::Assured => FLOW_INDEX.get_ptr(key),
            Tier::New => NEW_FLOW_INDEX.get_ptr(key),
        }?;
        // SAFETY: the kernel's lookup returned a pointer to a whole element; the copy carries a check of the key.
        Some(unsafe { *target })
    }

    #[inline(always)]
    fn add_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool {
        insert_index(tier, key, target, BPF_NOEXIST)
    }

    #[inline(always)]
    fn put_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool {
        insert_index(tier, key, target, BPF_ANY)
    }

    #[inline(always)]
    fn remove_index(&self, tier: Tier, key: &FlowKey) {
        let _ = match tier {
            Tier::Assured => FLOW_INDEX.remove(key),
            Tier::New => NEW_FLOW_INDEX.remove(key),
        };
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: copied at once; the ports of another packet mislead one fragment at worst.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) -> bool {
        FRAGMENTS.insert(key, ports, BPF_ANY).is_ok()
    }

    #[inline(always)]
    fn in_source_ranges(&self, service: ServiceId, client: &Addr) -> bool {
        SOURCE_RANGES.get(&lpm_trie::Key::new(160, SourceRange { service, addr: *client })).is_some()
    }

    #[inline(always)]
    fn is_pod_source(&self, addr: &Addr) -> bool {
        POD_SOURCES.get(&lpm_trie::Key::new(128, *addr)).is_some()
    }

    #[inline(always)]
    fn device(&self, ifindex: IfIndex) -> Option<Device> {
        // SAFETY: copied at once; elements are replaced only when a device's own addresses change.
        unsafe { DEVICES.get(ifindex.0) }.copied()
    }

    #[inline(always)]
    fn device_flags(&self, ifindex: IfIndex) -> u32 {
        steps::device_flags(ifindex)
    }

    #[inline(always)]
    fn count_packet(&self, service: ServiceId, request: bool, bytes: u32) {
        if let Some(counters) = SERVICE_COUNTERS.get_ptr_mut(service.0) {
            // SAFETY: a per-CPU element: nobody else writes this CPU's copy while the program runs.
            let counters = unsafe { &mut *counters };
            let (packets, sum) = if request {
                (&mut counters.request_packets, &mut counters.request_bytes)
            } else {
                (&mut counters.reply_packets, &mut counters.reply_bytes)
            };
            *packets = packets.wrapping_add(1);
            *sum = sum.wrapping_add(u64::from(bytes));
        }
    }

    #[inline(always)]
    fn count_connection(&self, service: ServiceId) {
        if let Some(counters) = SERVICE_COUNTERS.get_ptr_mut(service.0) {
            // SAFETY: a per-CPU element: nobody else writes this CPU's copy while the program runs.
            let counters = unsafe { &mut *counters };
            counters.connections = counters.connections.wrapping_add(1);
        }
    }

    #[inline(always)]
    fn try_source(&self, work: &mut Work, tier: Tier, spare: bool) -> bool {
        steps::try_source(work, tier, spare)
    }

    #[inline(always)]
    fn try_tuple(&self, work: &mut Work, own: bool) -> bool {
        steps::try_tuple(work, own)
    }
}

#[inline(always)]
fn insert_index(tier: Tier, key: &FlowKey, target: &FlowRef, flags: u64) -> bool {
    match tier {
        Tier::Assured => FLOW_INDEX.insert(key, target, flags),
        Tier::New => NEW_FLOW_INDEX.insert(key, target, flags),
    }
    .is_ok()
}
