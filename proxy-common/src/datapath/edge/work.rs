//! Values that one stage of the pipeline passes on to the next.

use super::parsed::{Parsed, Tuple};
use crate::abi::{BackendId, Counter, Flow, FlowKey, IfIndex, Nanos, Origin, ServiceId};
use crate::addr::Addr;

/// Intermediate results on the way to a packet's flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Work {
    /// Key of the flow's record.
    pub key: FlowKey,
    /// Key of the flow's index entry from the VIP.
    pub index: FlowKey,
    /// Destination of a new flow.
    pub to: Choice,
    /// Refusal of a new flow.
    pub refusal: Refusal,
    /// Record of a new flow.
    pub flow: Flow,
    /// Tuple that the packet is translated to.
    pub new: Tuple,
    /// Changes to an ICMP error.
    pub edit: Edit,
    /// Time when the packet came.
    pub now: Nanos,
    /// Origin of the flows that the packet can belong to.
    pub origin: Origin,
    /// For a packet that enters: index of the external device, 0 if the packet is a pod's. For a packet that
    /// leaves: index of the device by which the client's requests enter, 0 if that does not matter.
    pub asked_by: IfIndex,
    /// TCP numbers of the packet.
    pub numbers: Numbers,
    /// Whether the packet is to a backend itself: a value of [`Beside`].
    pub beside: u32,
    /// Effect of the packet on the flow that it meets: a value of [`Meeting`]. The verifier
    /// does not know the value here; otherwise it would follow each value on its own.
    pub meeting: u32,
}

/// Memory for one packet, too large for the 512 bytes of stack that a BPF program has. Data that an
/// earlier packet has left in it does not matter.
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

/// Destination of a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Choice {
    /// IP protocol number.
    pub proto: u8,
    /// Service id.
    pub service: ServiceId,
    /// Backend id.
    pub backend: BackendId,
}

/// Numbers of a TCP segment, in host order; zero for other protocols.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Numbers {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; valid only with ACK.
    pub ack: u32,
    /// Bytes of data.
    pub data: u32,
}

/// Effect of a client's packet on the flow that it meets.
pub struct Meeting;

impl Meeting {
    /// The packet belongs to the flow, or to the second flow that has begun beside it.
    pub const GOES_ON: u32 = 0;
    /// The packet begins a flow in the place of this one.
    pub const REPLACES: u32 = 1;
    /// The packet begins a flow with another source port: somebody else's connection has the addresses and
    /// ports of this flow.
    pub const AVOIDS: u32 = 2;
    /// The packet begins a second flow beside this one.
    pub const BESIDE: u32 = 3;
}

/// Decision on a packet that is not translated. Both fields always hold a value: the verifier refuses to copy
/// memory that was never written, such as the absent payload of an enum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Refusal {
    pub(super) how: How,
    pub(super) why: Counter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum How {
    /// The packet is translated.
    Not,
    /// The packet is none of ours and goes on.
    Pass,
    /// The packet is dropped without an answer.
    Drop,
    /// The sender is told that nobody serves the packet.
    Reject,
}

impl Refusal {
    /// No refusal. Nothing is counted.
    pub(super) const NOT: Self = Self { how: How::Not, why: Counter::Flow };
    /// The packet is none of ours. Nothing is counted.
    pub(super) const PASS: Self = Self { how: How::Pass, why: Counter::Flow };

    #[inline(always)]
    pub(super) const fn drop(why: Counter) -> Self {
        Self { how: How::Drop, why }
    }

    #[inline(always)]
    pub(super) const fn reject(why: Counter) -> Self {
        Self { how: How::Reject, why }
    }
}

impl Default for Refusal {
    fn default() -> Self {
        Self::NOT
    }
}

/// Values of [`Work::beside`].
pub struct Beside;

impl Beside {
    /// The packet needs no direct flow.
    pub const NOTHING: u32 = 0;
    /// The packet is to a backend itself, and a flow has its addresses and ports, or had them when the direct
    /// flow began.
    pub const MEETS: u32 = 1;
    /// The packet begins a direct flow.
    pub const BEGINS: u32 = 2;
}

/// New addresses of the error, and new tuple of the packet that it quotes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Edit {
    pub(super) source: Addr,
    pub(super) destination: Addr,
    pub(super) quoted: Tuple,
}
