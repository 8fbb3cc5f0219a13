//! The catalogue of maps: every map with its name, layout, growth, writers and readers, once.
//!
//! The agent makes, checks and grows the maps by this table, code names maps by its constants, and the table in
//! `docs/maps.md` is printed from it. `proxy-ebpf/src/maps.rs` declares the same maps for the programs; a test compares the
//! object with the catalogue.

use crate::abi::socket::{Order, SocketRecord, StreamRecord, UdpFlow, UdpFlowKey};
use crate::abi::{
    AffinityKey, AffinityValue, Backend, Device, Event, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts,
    FrontendKey, FrontendValue, Node, PrefixKey, Service, ServiceCounters, ServiceName, SourceRangeKey,
    Trace,
};
use crate::addr::Addr;

/// Type of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Array that the agent maps into its memory.
    MmapableArray,
    /// Array that is read and written by system calls.
    Array,
    /// Array with one element per CPU.
    PerCpuArray,
    /// Hash that refuses new elements when it is full.
    Hash,
    /// Hash that evicts the least recently used element when it is full.
    LruHash,
    /// Trie that finds the longest prefix.
    LpmTrie,
    /// Storage in sockets, which goes with its socket.
    SocketStorage,
    /// Ring buffer.
    RingBuffer,
}

/// A map of the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    /// Name of the map and of its pin.
    pub name: &'static str,
    /// Type of the map.
    pub kind: MapKind,
    /// Size of a key in bytes.
    pub key: usize,
    /// Size of a value in bytes.
    pub value: usize,
    /// Whether the size of the map follows the cluster: such maps grow together while Services are served.
    pub grows: bool,
    /// Whether the map can be kept while the others are replaced, because its contents refer to none of them.
    pub independent: bool,
    /// Meaning of the key.
    pub key_is: &'static str,
    /// Meaning of the value.
    pub value_is: &'static str,
    /// Writers of the elements.
    pub written_by: &'static str,
    /// Readers of the elements.
    pub read_by: &'static str,
}

macro_rules! catalogue {
    ($($name:ident: $kind:ident<$key:ty, $value:ty>, $grows:literal, $independent:literal,
        $key_is:literal, $value_is:literal, $written_by:literal, $read_by:literal;)*) => {
        $(
            #[doc = concat!("Name of the map of ", $value_is, ", by ", $key_is, ".")]
            pub const $name: &str = stringify!($name);
        )*

        /// All maps.
        pub const ALL: &[Map] = &[$(Map {
            name: $name,
            kind: MapKind::$kind,
            key: size_of::<$key>(),
            value: size_of::<$value>(),
            grows: $grows,
            independent: $independent,
            key_is: $key_is,
            value_is: $value_is,
            written_by: $written_by,
            read_by: $read_by,
        }),*];
    };
}

// name: type<key, value>, grows, independent, meaning of the key, meaning of the value, writers, readers.
catalogue! {
    FILTER: MmapableArray<u32, u64>, false, false,
        "word", "64 bits: which addresses may be ours", "agent", "both edges";
    FRONTENDS: Hash<FrontendKey, FrontendValue>, true, false,
        "address, port, protocol, kind", "service id, flags, check", "agent", "both edges";
    SERVICES: MmapableArray<u32, Service>, true, false,
        "service id", "cluster range, local range, affinity", "agent", "both edges";
    SLOTS: MmapableArray<u32, u32>, true, false,
        "slot", "backend id", "agent", "both edges";
    BACKENDS: MmapableArray<u32, Backend>, true, false,
        "backend id", "address, port, service id, flags, generation", "agent", "both edges";
    NAMES: Hash<u32, ServiceName>, true, false,
        "service id", "namespace, name, port name, protocol, family", "agent", "agent, tools";
    LOCAL_ADDRESSES: Hash<Addr, u32>, false, false,
        "address", "bits: 1 of this host, 2 serves nodePorts", "agent", "both edges";
    SERVICE_CIDRS: LpmTrie<PrefixKey, u32>, false, false,
        "prefix", "1", "agent", "both edges";
    SOURCE_RANGES: LpmTrie<SourceRangeKey, u32>, true, false,
        "service id, prefix", "1", "agent", "packet edge";
    POD_SOURCES: LpmTrie<PrefixKey, u32>, false, false,
        "prefix", "1", "agent", "packet edge";
    DEVICES: Hash<u32, Device>, false, true,
        "interface index", "SNAT source v4 and v6, flags", "agent", "packet edge";
    OPT_OUT: Hash<u64, u32>, false, true,
        "cgroup id", "what is left alone: 1 everything, 2 networks inside the pod", "agent", "socket edge";
    SANDBOXES: Hash<u64, u64>, false, true,
        "cookie of a pod's network namespace", "cgroup id of the pod", "agent", "socket edge (the key)";
    NODE: MmapableArray<u32, Node>, false, true,
        "0", "cookie of the host's network namespace, flags", "socket edge (cookie), agent (flags)", "socket edge";
    AFFINITY: LruHash<AffinityKey, AffinityValue>, false, false,
        "client, service id", "backend id, generation, epoch, last seen (ns)", "both edges", "both edges";
    NEW_AFFINITY: LruHash<AffinityKey, AffinityValue>, false, false,
        "as `AFFINITY`, of clients of packets that have not gone on after a reply", "as `AFFINITY`",
        "packet edge", "packet edge";
    // A backend id in this map is used only together with the address beside it.
    UDP_FLOWS: LruHash<UdpFlowKey, UdpFlow>, false, true,
        "socket cookie, address, port, direction; for the VIPs of a socket beside its first",
        "address, port, last use, backend id, check", "socket edge", "socket edge";
    STREAMS: Array<u32, StreamRecord>, false, true,
        "slot", "socket cookie, VIP, backend, their ports, ids, check",
        "socket edge, agent (frees what is left)", "socket edge";
    SOCKETS: SocketStorage<i32, SocketRecord>, false, true,
        "socket", "VIP, backend, their ports, ids", "socket edge", "socket edge, agent";
    ORDERS: SocketStorage<i32, Order>, false, true,
        "socket", "VIP, peer, their ports: the agent leads the socket", "agent", "socket edge";
    // Flows carry addresses; a flow's backend id is used only together with them.
    FLOWS: Hash<FlowKey, Flow>, false, true,
        "origin, client, backend, their ports, protocol",
        "VIP, SNAT source, ids, the devices of the replies and of the last request, state, last seen (ns), check",
        "packet edge", "packet edge, agent";
    NEW_FLOWS: LruHash<FlowKey, Flow>, false, true,
        "as `FLOWS`", "as `FLOWS`, of flows whose client has not gone on after a reply", "packet edge", "packet edge, agent";
    FLOW_INDEX: Hash<FlowKey, FlowRef>, false, true,
        "origin; client, VIP, or backend, our address; their ports, protocol", "the rest of the record's key, check",
        "packet edge", "packet edge, agent";
    NEW_FLOW_INDEX: LruHash<FlowKey, FlowRef>, false, true,
        "as `FLOW_INDEX`", "as `FLOW_INDEX`, of `NEW_FLOWS`", "packet edge", "packet edge";
    FRAGMENTS: LruHash<FragmentKey, FragmentPorts>, false, true,
        "origin, addresses, identification, protocol, direction", "ports of the first fragment",
        "packet edge", "packet edge";
    SERVICE_COUNTERS: PerCpuArray<u32, ServiceCounters>, true, false,
        "service id", "connections, packets and bytes of either direction", "packet edge, agent", "agent, tools";
    COUNTERS: PerCpuArray<u32, u64>, false, true,
        "counter", "count", "both edges", "agent, tools";
    TRACE: MmapableArray<u32, Trace>, false, true,
        "0", "until when somebody watches, which Service, how many packets", "`proxy-agent monitor`", "both edges";
    EVENTS: RingBuffer<(), Event>, false, true,
        "–", "decisions, while somebody watches", "both edges", "`proxy-agent monitor`";
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the table of `docs/maps.md`.
    fn table() -> Vec<String> {
        let row = |map: &Map| {
            let (kind, key) = match map.kind {
                MapKind::MmapableArray => ("array, mmapable", 0),
                MapKind::Array => ("array", 0),
                MapKind::PerCpuArray => ("per-CPU array", 0),
                MapKind::Hash => ("hash", map.key),
                MapKind::LruHash => ("LRU hash", map.key),
                MapKind::LpmTrie => ("LPM trie", map.key),
                MapKind::SocketStorage => ("socket storage", 0),
                MapKind::RingBuffer => ("ring buffer", 0),
            };
            let bytes = if key == 0 { map.value.to_string() } else { format!("{key} + {}", map.value) };
            let Map { name, key_is, value_is, written_by, read_by, .. } = map;
            format!("| `{name}` | {kind} | {key_is} | {value_is} | {bytes} | {written_by} | {read_by} |")
        };
        ALL.iter().map(row).collect()
    }

    #[test]
    fn the_documented_table_is_this_one() {
        let document = include_str!("../../../docs/maps.md");
        let rows = document.lines().skip_while(|line| !line.starts_with("| map | type |")).skip(2);
        let documented: Vec<_> = rows.take_while(|line| line.starts_with('|')).collect();
        assert_eq!(documented, table(), "the table should be:\n{}", table().join("\n"));
    }

    #[test]
    fn every_name_is_there_once() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|map| map.name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
