//! Every BPF map, and [`Maps`]: the datapath's view of them. All `unsafe` of the kernel side for maps is here.
//!
//! Sizes are placeholders: the agent sets them when it creates the maps. Names and types are the ABI (`docs/maps.md`).

use aya_ebpf::Global;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use proxy_common::abi::{
    AffinityKey, AffinityValue, Backend, Device, FILTER_WORDS, Flow, FlowKey, FlowRef, FragmentKey,
    FragmentPorts, FrontendKey, FrontendValue, Node, Service, ServiceCounters, ServiceId, ServiceName,
    SocketRecord, StreamRecord, Trace, UdpFlow, UdpFlowKey, socket::Order, socket::STREAM_SLOTS,
};
use proxy_common::addr::Addr;
use proxy_common::datapath::edge::work::Scratch;

pub(crate) const BPF_ANY: u64 = 0;
pub(crate) const BPF_NOEXIST: u64 = 1;
const BPF_F_NO_PREALLOC: usize = 1;
const BPF_F_MMAPABLE: usize = 1 << 10;

#[btf_map]
pub(crate) static FILTER: Array<u64, { FILTER_WORDS as usize }, BPF_F_MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static FRONTENDS: HashMap<FrontendKey, FrontendValue, 1> = HashMap::new();

#[btf_map]
pub(crate) static SERVICES: Array<Service, 1, BPF_F_MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static SLOTS: Array<u32, 1, BPF_F_MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static BACKENDS: Array<Backend, 1, BPF_F_MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static NODE: Array<Node, 1, BPF_F_MMAPABLE> = Array::new();

/// Names of Service ports. No program reads them: they let tools work without the agent, and let the agent find its ids
/// again.
#[btf_map]
pub(crate) static NAMES: HashMap<u32, ServiceName, 1, BPF_F_NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static LOCAL_ADDRESSES: HashMap<Addr, u32, 1, BPF_F_NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static SERVICE_CIDRS: LpmTrie<Addr, u32, 1, BPF_F_NO_PREALLOC> = LpmTrie::new();

/// Cgroups whose sockets are left alone: all their sockets, or those in network namespaces inside a pod.
#[btf_map]
pub(crate) static OPT_OUT: HashMap<u64, u32, 1, BPF_F_NO_PREALLOC> = HashMap::new();

/// Network namespaces of pods. The value is the pod's cgroup; no program reads it.
#[btf_map]
pub(crate) static SANDBOXES: HashMap<u64, u64, 1, BPF_F_NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, AffinityValue, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static NEW_AFFINITY: LruHashMap<AffinityKey, AffinityValue, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static UDP_FLOWS: LruHashMap<UdpFlowKey, UdpFlow, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static STREAMS: Array<StreamRecord, { STREAM_SLOTS as usize }> = Array::new();

#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketRecord> = SkStorage::new();

#[btf_map]
pub(crate) static ORDERS: SkStorage<Order> = SkStorage::new();

#[btf_map]
pub(crate) static SOURCE_RANGES: LpmTrie<SourceRange, u32, 1, BPF_F_NO_PREALLOC> = LpmTrie::new();

#[btf_map]
pub(crate) static POD_SOURCES: LpmTrie<Addr, u32, 1, BPF_F_NO_PREALLOC> = LpmTrie::new();

#[btf_map]
pub(crate) static DEVICES: HashMap<u32, Device, 1> = HashMap::new();

#[btf_map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow, 1, BPF_F_NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static FLOW_INDEX: HashMap<FlowKey, FlowRef, 1, BPF_F_NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static NEW_FLOWS: LruHashMap<FlowKey, Flow, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static NEW_FLOW_INDEX: LruHashMap<FlowKey, FlowRef, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 1> = LruHashMap::new();

#[btf_map]
pub(crate) static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

#[btf_map]
pub(crate) static SERVICE_COUNTERS: PerCpuArray<ServiceCounters, 1> = PerCpuArray::new();

/// Whether a process watches; written by `proxy-agent monitor`.
#[btf_map]
pub(crate) static TRACE: Array<Trace, 1, BPF_F_MMAPABLE> = Array::new();

#[btf_map]
pub(crate) static EVENTS: RingBuf<(), { 1 << 20 }> = RingBuf::new();

#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, 32> = PerCpuArray::new();

/// Whether the programs may read the clock of the last timer interrupt (5.11). That clock is right to some
/// milliseconds, which is enough for flows, and costs a tenth. Set by the loader.
#[unsafe(no_mangle)]
pub(crate) static COARSE_CLOCK: Global<u8> = Global::new(0);

/// Part of a `SOURCE_RANGES` key behind the length.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SourceRange {
    pub(crate) service: ServiceId,
    pub(crate) addr: Addr,
}

/// The maps above, as the datapath's tables.
pub(crate) struct Maps;

/// Returns this CPU's memory for one packet. `None` never happens. Call it only once in each run of a program.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a per-CPU element, and programs of this kind do not interrupt each other. Its content has been written by
    // this very code, or is zero, which is valid too.
    Some(unsafe { &mut *scratch })
}
