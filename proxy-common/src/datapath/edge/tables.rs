//! What the packet edge looks at and writes, beside [`Tables`].

use super::flows::{self, Choice, Numbers};
use super::icmp::Edit;
use super::judge::Refusal;
use super::parse::{Parsed, Tuple};
use crate::abi::{Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, Origin};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::tables::Tables;
pub use crate::datapath::tables::Tier;

/// What is made on the way to a flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Work {
    /// Key of the flow's record.
    pub key: FlowKey,
    /// Key of its index entry from the VIP.
    pub index: FlowKey,
    /// Where a new flow goes.
    pub to: Choice,
    /// Why it goes nowhere.
    pub refusal: Refusal,
    /// A new record.
    pub flow: Flow,
    /// What the packet is translated to.
    pub new: Tuple,
    /// What becomes of an ICMP error.
    pub edit: Edit,
    /// When the packet came: nanoseconds of the monotonic clock.
    pub now: u64,
    /// Whose flows the packet can belong to.
    pub origin: Origin,
    /// Of a packet that enters: index of the external device, 0 if it is a pod's. Of one that leaves: the device by which its client
    /// has asked, 0 if that does not matter.
    pub asked_by: u32,
    /// The packet's numbers.
    pub numbers: Numbers,
    /// Whether the packet is to a backend itself: a [`super::direct::Beside`].
    pub beside: u32,
    /// What the packet does to the flow that it meets: a [`super::flows::Meeting`]. The verifier would follow each of them
    /// if it knew which.
    pub meeting: u32,
}

/// What one packet needs on its way, too much for the 512 bytes of stack that a BPF program has. What another packet has
/// left in it does not matter.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Scratch {
    /// The packet's headers.
    pub parsed: Parsed,
    /// The headers that an ICMP error quotes.
    pub quote: Parsed,
    /// The packet's flow.
    pub work: Work,
}

/// A record in place. The kernel gives elements to other flows under readers, so every store is for the record with a
/// [`Flow::check`]: another one's is left alone.
pub trait FlowCell: Clone {
    /// What it holds.
    fn get(&self) -> Flow;
    /// Replaces the state.
    fn set_state(&self, check: u32, state: u32);
    /// Replaces [`Flow::expected`].
    fn set_expected(&self, check: u32, number: u32);
    /// Replaces [`Flow::syn`].
    fn set_syn(&self, check: u32, syn: u16);
    /// Notes by which device the backend's answers enter.
    fn set_answered_by(&self, check: u32, ifindex: u32);
    /// Notes by which device the client's packets enter.
    fn set_asked_by(&self, check: u32, ifindex: u32);
    /// Prolongs the flow.
    fn set_last_seen(&self, check: u32, now: u64);
    /// Notes the translated source: the address first, since the port says that both count.
    fn set_snat(&self, check: u32, addr: Addr, port: Be16);
}

/// The maps of the packet edge.
pub trait EdgeTables: Tables {
    /// A record in place.
    type Cell: FlowCell;
    /// `FLOWS` or `NEW_FLOWS`.
    fn flow(&self, tier: Tier, key: &FlowKey) -> Option<Self::Cell>;
    /// Adds a record; false if there is one, or no room.
    fn add_flow(&self, tier: Tier, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes a record, if there is one.
    fn remove_flow(&self, tier: Tier, key: &FlowKey);
    /// `FLOW_INDEX` or `NEW_FLOW_INDEX`.
    fn index(&self, tier: Tier, key: &FlowKey) -> Option<FlowRef>;
    /// Adds an index entry; false if there is one, or no room.
    fn add_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool;
    /// Adds or replaces an index entry; false if there is no room.
    fn put_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool;
    /// Removes an index entry, if there is one.
    fn remove_index(&self, tier: Tier, key: &FlowKey);
    /// `FRAGMENTS`.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Remembers the ports of a fragmented packet; false if that failed.
    fn put_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) -> bool;
    /// Whether `SOURCE_RANGES` lets `client` use the Service port.
    fn in_source_ranges(&self, service: u32, client: &Addr) -> bool;
    /// Whether `POD_SOURCES` contains the address.
    fn is_pod_source(&self, addr: &Addr) -> bool;
    /// `DEVICES`.
    fn device(&self, ifindex: u32) -> Option<Device>;
    /// `DEVICES`: the flags of a device, none if there is no such device.
    fn device_flags(&self, ifindex: u32) -> u32;
    /// `SERVICE_COUNTERS`: a packet of `bytes`, in or against the direction of the request.
    fn count_packet(&self, service: u32, request: bool, bytes: u32);
    /// `SERVICE_COUNTERS`: a new flow.
    fn count_connection(&self, service: u32);
    /// [`flows::try_source`]. In the kernel a function that is verified once, not on each way to it.
    fn try_source(&self, work: &mut Work, tier: Tier, spare: bool) -> bool
    where
        Self: Sized,
    {
        flows::try_source(self, work, tier, spare)
    }
    /// [`flows::try_tuple`], likewise.
    fn try_tuple(&self, work: &mut Work, own: bool) -> bool
    where
        Self: Sized,
    {
        flows::try_tuple(self, work, own)
    }
}
