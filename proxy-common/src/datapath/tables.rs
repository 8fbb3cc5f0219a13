//! What decisions may look at and write: traits that BPF maps implement in the kernel and ordered maps in tests.

use crate::abi::{
    AffinityKey, AffinityValue, Backend, Counter, Event, FrontendKey, FrontendValue, Node, Service,
    SocketRecord, StreamRecord, Trace, UdpFlow, UdpFlowKey, socket::Order,
};
use crate::addr::Addr;
use crate::be::Be16;

/// Which of two maps that hold the same: packets that anybody may have forged fill one of them alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// `FLOWS`, `FLOW_INDEX` and `AFFINITY`: of clients that have gone on after an answer.
    Assured,
    /// `NEW_FLOWS`, `NEW_FLOW_INDEX` and `NEW_AFFINITY`: of clients that nothing is known of yet.
    New,
}

impl Tier {
    /// The other one.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Assured => Self::New,
            Self::New => Self::Assured,
        }
    }
}

/// Maps that the agent fills, and the two sources of randomness and time.
pub trait Tables {
    /// `FILTER`: 64 of its bits.
    fn filter(&self, word: u32) -> u64;
    /// `FRONTENDS`, one aligned load. The value may be another key's: see [`FrontendValue::is_for`].
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// `SERVICES`: every word loaded once.
    fn service(&self, id: u32) -> Option<Service>;
    /// `SLOTS`.
    fn slot(&self, index: u32) -> Option<u32>;
    /// `BACKENDS`: `state` is loaded first.
    fn backend(&self, id: u32) -> Option<Backend>;
    /// `LOCAL_ADDRESSES`: bits of [`crate::abi::local_address`], 0 for an address that is not this host's.
    fn local_address(&self, addr: &Addr) -> u32;
    /// Whether `SERVICE_CIDRS` contains the address.
    fn in_service_cidr(&self, addr: &Addr) -> bool;
    /// `NODE`: every word loaded once.
    fn node(&self) -> Node;
    /// `OPT_OUT`: what of the cgroup's processes is left to the packet edge ([`crate::abi::opt_out`]); 0 for nothing.
    fn opted_out(&self, cgroup: u64) -> u32;
    /// `SANDBOXES`: whether the network namespace with this cookie is a pod's own.
    fn is_sandbox(&self, netns: u64) -> bool;
    /// Notes the cookie of the host's network namespace.
    fn learn_host_netns(&self, cookie: u64);
    /// `AFFINITY` or `NEW_AFFINITY`.
    fn affinity(&self, tier: Tier, key: &AffinityKey) -> Option<AffinityValue>;
    /// Remembers a client. Failure is not an error: the client is only forgotten.
    fn remember(&self, tier: Tier, key: &AffinityKey, value: &AffinityValue);
    /// `STREAMS`.
    fn stream(&self, slot: u32) -> Option<StreamRecord>;
    /// Writes an element of `STREAMS`; false when there is none.
    fn put_stream(&self, slot: u32, stream: &StreamRecord) -> bool;
    /// Makes an element of `STREAMS` free: its first word becomes 0.
    fn free_stream(&self, slot: u32);
    /// `UDP_FLOWS`.
    fn udp_flow(&self, key: &UdpFlowKey) -> Option<UdpFlow>;
    /// Writes an entry of `UDP_FLOWS`; false when that failed.
    fn put_udp_flow(&self, key: &UdpFlowKey, flow: &UdpFlow) -> bool;
    /// Removes an entry of `UDP_FLOWS`.
    fn drop_udp_flow(&self, key: &UdpFlowKey);
    /// Adds one to a counter.
    fn count(&self, counter: Counter);
    /// `TRACE`.
    fn trace(&self) -> Trace;
    /// Puts the event that `make` makes into `EVENTS`, in place: it is too much for the stack. One that finds no room is
    /// lost.
    fn tell(&self, make: impl FnOnce() -> Event);
    /// 32 random bits.
    fn random(&self) -> u32;
    /// Nanoseconds of the monotonic clock.
    fn now(&self) -> u64;
}

/// Nanoseconds from `then` to `now`, both of the monotonic clock; 0 if `then` is still to come.
///
/// The clock begins with the machine and never comes near 2^63. A time before it is a negative number.
#[inline(always)]
pub const fn since(then: u64, now: u64) -> u64 {
    let passed = now.wrapping_sub(then);
    if passed >> 63 == 0 { passed } else { 0 }
}

/// The socket and the address that a cgroup hook was called for.
pub trait Socket {
    /// The peer address in question: what the application asked for, or where a datagram came from.
    fn addr(&self) -> Addr;
    /// Its port.
    fn port(&self) -> Be16;
    /// Where the kernel has the socket connected; port 0 while it is not.
    fn peer(&self) -> (Addr, Be16);
    /// The socket's protocol number as the kernel has it (262 for MPTCP, so wider than a byte).
    fn protocol(&self) -> u32;
    /// Cookie of the socket.
    fn cookie(&self) -> u64;
    /// Cookie of the socket's network namespace.
    fn netns(&self) -> u64;
    /// Id of the cgroup that contains the calling process, so many levels below the root of the hierarchy; 0 where its own
    /// is higher.
    fn cgroup(&self, level: i32) -> u64;
    /// [`super::socket::is_of_opt_out`]. In the kernel a function that is verified once, not on each way to it.
    fn is_of_opt_out(&self, tables: &impl Tables, inside: bool) -> bool {
        super::socket::is_of_opt_out(|level| self.cgroup(level), tables, inside)
    }
    /// Replaces the peer address. `addr` is of the family that the hook is for, or IPv4-mapped.
    fn rewrite(&mut self, addr: Addr, port: Be16);
    /// `SOCKETS`: this socket's record.
    fn record(&self) -> Option<SocketRecord>;
    /// Writes this socket's record; false when that failed.
    fn put_record(&mut self, record: SocketRecord) -> bool;
    /// Forgets this socket's record, if there is one.
    fn drop_record(&mut self);
    /// `ORDERS`: what the agent wants of this socket.
    fn order(&self) -> Option<Order>;
    /// Removes it, if there is one.
    fn drop_order(&mut self);
}
