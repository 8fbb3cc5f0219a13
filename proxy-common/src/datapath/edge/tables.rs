//! Data that the packet edge reads and writes, in addition to [`Tables`].

use super::work::Work;
use crate::abi::{Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, IfIndex, Nanos, ServiceId};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::tables::Tables;
pub use crate::datapath::tables::Tier;

/// Record in place. The kernel may give its element to another flow while it is in use. Every store therefore
/// names the [`Flow::check`] of its record, and leaves another flow's record alone.
pub trait FlowCell: Clone {
    /// Returns the current content of the record.
    fn get(&self) -> Flow;
    /// Replaces the state.
    fn set_state(&self, check: u32, state: u32);
    /// Replaces [`Flow::expected`].
    fn set_expected(&self, check: u32, number: u32);
    /// Replaces [`Flow::syn`].
    fn set_syn(&self, check: u32, syn: u16);
    /// Notes the device by which the backend's replies enter.
    fn set_answered_by(&self, check: u32, ifindex: IfIndex);
    /// Notes the device by which the client's packets enter.
    fn set_asked_by(&self, check: u32, ifindex: IfIndex);
    /// Prolongs the flow.
    fn set_last_seen(&self, check: u32, now: Nanos);
    /// Notes the SNAT source: the address first, because a port other than 0 says that both count.
    fn set_snat(&self, check: u32, addr: Addr, port: Be16);
}

/// The maps of the packet edge.
pub trait EdgeTables: Tables {
    /// Record in place.
    type Cell: FlowCell;
    /// `FLOWS` or `NEW_FLOWS`.
    fn flow(&self, tier: Tier, key: &FlowKey) -> Option<Self::Cell>;
    /// Adds a record. Returns false if the key has a record already, or if there is no room.
    fn add_flow(&self, tier: Tier, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes a record, if there is one.
    fn remove_flow(&self, tier: Tier, key: &FlowKey);
    /// `FLOW_INDEX` or `NEW_FLOW_INDEX`.
    fn index(&self, tier: Tier, key: &FlowKey) -> Option<FlowRef>;
    /// Adds an index entry. Returns false if the key has an entry already, or if there is no room.
    fn add_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool;
    /// Adds or replaces an index entry. Returns false if there is no room.
    fn put_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool;
    /// Removes an index entry, if there is one.
    fn remove_index(&self, tier: Tier, key: &FlowKey);
    /// `FRAGMENTS`.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Remembers the ports of a fragmented packet. Returns false on failure.
    fn put_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) -> bool;
    /// Returns whether `SOURCE_RANGES` lets `client` use the Service port.
    fn in_source_ranges(&self, service: ServiceId, client: &Addr) -> bool;
    /// Returns whether `POD_SOURCES` contains the address.
    fn is_pod_source(&self, addr: &Addr) -> bool;
    /// `DEVICES`.
    fn device(&self, ifindex: IfIndex) -> Option<Device>;
    /// `DEVICES`: flags of a device; 0 if there is no such device.
    fn device_flags(&self, ifindex: IfIndex) -> u32;
    /// Counts a packet of `bytes` in `SERVICE_COUNTERS`, as a request or a reply.
    fn count_packet(&self, service: ServiceId, request: bool, bytes: u32);
    /// Counts a new flow in `SERVICE_COUNTERS`.
    fn count_connection(&self, service: ServiceId);
    /// Calls [`super::flows::try_source`]. In the kernel this is a function of its own, which is verified once
    /// and not on each path to it.
    fn try_source(&self, work: &mut Work, tier: Tier, spare: bool) -> bool;
    /// Calls [`super::flows::try_tuple`], likewise.
    fn try_tuple(&self, work: &mut Work, own: bool) -> bool;
}
