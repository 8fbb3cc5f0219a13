//! Data that decisions may read and write: traits that BPF maps implement in the kernel and ordered maps in
//! tests.

use crate::abi::{
    AffinityKey, AffinityValue, Backend, BackendId, CgroupId, Counter, Event, FrontendKey, FrontendValue,
    Nanos, NetnsCookie, Node, Service, ServiceId, Slot, SocketRecord, StreamRecord, StreamSlot, Trace,
    UdpFlow, UdpFlowKey, socket::Order,
};
use crate::addr::Addr;
use crate::be::Be16;

/// One of two maps of the same type. Packets that anybody may have forged fill only one of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// `FLOWS`, `FLOW_INDEX` and `AFFINITY`: for clients that have gone on after a reply.
    Assured,
    /// `NEW_FLOWS`, `NEW_FLOW_INDEX` and `NEW_AFFINITY`: for clients of which nothing is known yet.
    New,
}

impl Tier {
    /// Returns the other tier.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Assured => Self::New,
            Self::New => Self::Assured,
        }
    }
}

/// Maps of the datapath, and the sources of randomness and time.
pub trait Tables {
    /// `FILTER`: 64 of its bits.
    fn filter(&self, word: u32) -> u64;
    /// `FRONTENDS`, one aligned load. The value may be another key's: see [`FrontendValue::is_for`].
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// `SERVICES`: every word loaded once.
    fn service(&self, id: ServiceId) -> Option<Service>;
    /// `SLOTS`.
    fn slot(&self, slot: Slot) -> Option<BackendId>;
    /// `BACKENDS`: `state` is loaded first.
    fn backend(&self, id: BackendId) -> Option<Backend>;
    /// `LOCAL_ADDRESSES`: bits of [`crate::abi::local_address`], 0 for an address that is not this host's.
    fn local_address(&self, addr: &Addr) -> u32;
    /// Returns whether `SERVICE_CIDRS` contains the address.
    fn in_service_cidr(&self, addr: &Addr) -> bool;
    /// `NODE`: every word loaded once.
    fn node(&self) -> Node;
    /// `OPT_OUT`: sockets of the cgroup's processes that are left to the packet edge
    /// ([`crate::abi::opt_out`]); 0 for none.
    fn opted_out(&self, cgroup: CgroupId) -> u32;
    /// Returns whether `SANDBOXES` says that the network namespace with this cookie is a pod's own.
    fn is_sandbox(&self, netns: NetnsCookie) -> bool;
    /// Notes the cookie of the host's network namespace.
    fn learn_host_netns(&self, cookie: NetnsCookie);
    /// `AFFINITY` or `NEW_AFFINITY`.
    fn affinity(&self, tier: Tier, key: &AffinityKey) -> Option<AffinityValue>;
    /// Remembers a client. A failure is no error: the client is only forgotten.
    fn remember(&self, tier: Tier, key: &AffinityKey, value: &AffinityValue);
    /// `STREAMS`.
    fn stream(&self, slot: StreamSlot) -> Option<StreamRecord>;
    /// Writes an element of `STREAMS`. Returns false if there is no such element.
    fn put_stream(&self, slot: StreamSlot, stream: &StreamRecord) -> bool;
    /// Frees an element of `STREAMS`: its first word becomes 0.
    fn free_stream(&self, slot: StreamSlot);
    /// `UDP_FLOWS`.
    fn udp_flow(&self, key: &UdpFlowKey) -> Option<UdpFlow>;
    /// Writes an entry of `UDP_FLOWS`. Returns false on failure.
    fn put_udp_flow(&self, key: &UdpFlowKey, flow: &UdpFlow) -> bool;
    /// Removes an entry of `UDP_FLOWS`.
    fn drop_udp_flow(&self, key: &UdpFlowKey);
    /// Adds one to a counter.
    fn count(&self, counter: Counter);
    /// `TRACE`.
    fn trace(&self) -> Trace;
    /// Puts the event that `make` returns into `EVENTS`, in place, because an event is too large for the
    /// stack. If there is no room, the event is lost.
    fn tell(&self, make: impl FnOnce() -> Event);
    /// Returns 32 random bits.
    fn random(&self) -> u32;
    /// Time of the monotonic clock.
    fn now(&self) -> Nanos;
}

/// Returns the nanoseconds from `then` to `now`, both of the monotonic clock; 0 if `then` is still to come.
///
/// The clock begins when the machine boots and never comes near 2^63. A time before the boot is a negative
/// number.
#[inline(always)]
pub const fn since(then: Nanos, now: Nanos) -> u64 {
    let passed = now.0.wrapping_sub(then.0);
    if passed >> 63 == 0 { passed } else { 0 }
}

/// Socket and address that a cgroup hook was called for.
pub trait Socket {
    /// Peer address in question: the address that the application asked for, or that a datagram came from.
    fn addr(&self) -> Addr;
    /// Port of [`Socket::addr`].
    fn port(&self) -> Be16;
    /// Address and port that the kernel has the socket connected to; port 0 while it is not connected.
    fn peer(&self) -> (Addr, Be16);
    /// Protocol number of the socket as the kernel has it (262 for MPTCP, so wider than a byte).
    fn protocol(&self) -> u32;
    /// Cookie of the socket.
    fn cookie(&self) -> u64;
    /// Cookie of the socket's network namespace.
    fn netns(&self) -> NetnsCookie;
    /// Id of the cgroup on the path to the calling process that is `level` levels below the root of the
    /// hierarchy; 0 if the process's own cgroup is higher.
    fn cgroup(&self, level: i32) -> CgroupId;
    /// Calls [`super::socket::is_of_opt_out`]. In the kernel this is a function of its own, which is verified
    /// once and not on each path to it.
    fn is_of_opt_out(&self, tables: &impl Tables, inside: bool) -> bool;
    /// Replaces the peer address. `addr` is of the family that the hook is for, or IPv4-mapped.
    fn rewrite(&mut self, addr: Addr, port: Be16);
    /// `SOCKETS`: this socket's record.
    fn record(&self) -> Option<SocketRecord>;
    /// Writes this socket's record. Returns false on failure.
    fn put_record(&mut self, record: SocketRecord) -> bool;
    /// Removes this socket's record, if there is one.
    fn drop_record(&mut self);
    /// `ORDERS`: the agent's order for this socket.
    fn order(&self) -> Option<Order>;
    /// Removes the order, if there is one.
    fn drop_order(&mut self);
}
