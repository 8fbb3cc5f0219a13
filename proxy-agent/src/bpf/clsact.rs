//! Filters, and the clsact queueing discipline that they hang on: for kernels without TCX (before 6.6), and for
//! `--no-tcx`.
//!
//! One clsact queueing discipline of a device holds everybody's filters. It is ours only if a note says so
//! ([`super::notes`]), and it is removed only when it holds no filter any more.

use std::collections::BTreeSet;
use std::io;

use aya::programs::tc::{self, TcError};
use proxy_common::abi::IfIndex;
use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlasIterator, parse_string,
    parse_u32,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::device::{AttachError, Device, Direction};
use super::notes::{Note, Notes};
use super::pins::{PinDir, PinError};
use crate::host::netlink::Netlink;

const KIND: &str = "clsact";

/// `htons(ETH_P_ALL)`, in the form in which filters name it.
const ALL_PROTOCOLS: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;

/// Attributes of linux/rtnetlink.h.
const TCA_KIND: u16 = 1;
const TCA_CHAIN: u16 = 11;

/// Returns the priority of our clsact filters: before all others on ingress, behind all others on egress.
pub(super) const fn priority(direction: Direction) -> u16 {
    match direction {
        Direction::Ingress => 1,
        Direction::Egress => u16::MAX,
    }
}

/// Handle of our clsact filters: "VIPR".
pub(super) const HANDLE: tc::TcHandle = tc::TcHandle::new(0x5649, 0x5052);

/// Identity of a filter of a device in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FilterId {
    pub(super) priority: u16,
    pub(super) handle: TcHandle,
}

/// A filter, or an entry that the kernel keeps beside filters of one priority.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) id: FilterId,
    /// Kind of filter: `bpf`, `u32`, `flower` and so on.
    pub(super) kind: String,
    /// Chain of the filter. Packets begin with chain 0, and go to another chain only if a filter sends them there.
    pub(super) chain: u32,
}

/// A netlink socket to the network namespace in which it was opened.
pub(super) struct TrafficControl {
    socket: Netlink,
}

/// The used part of an answer: the contents of filters are not parsed.
#[derive(Clone, Debug)]
struct Answer {
    header: TcHeader,
    kind: String,
    chain: u32,
}

impl NetlinkDeserializable for Answer {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut answer = Self { header: TcHeader::parse(payload)?, kind: String::new(), chain: 0 };
        // `struct tcmsg` has 20 bytes.
        for attribute in NlasIterator::new(payload.get(20..).unwrap_or_default()) {
            let attribute = attribute?;
            match attribute.kind() {
                TCA_KIND => answer.kind = parse_string(attribute.value())?,
                TCA_CHAIN => answer.chain = parse_u32(attribute.value())?,
                _ => {}
            }
        }
        Ok(answer)
    }
}

impl TrafficControl {
    /// Opens a netlink socket in the current network namespace.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: Netlink::open(NETLINK_ROUTE)? })
    }

    /// Returns the devices with a clsact queueing discipline. (A queueing discipline of the kind `ingress` answers a
    /// question for filters of either direction with the filters on the way in.)
    pub(super) fn devices(&self) -> io::Result<BTreeSet<IfIndex>> {
        let mut devices = BTreeSet::new();
        self.socket.dump(
            RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
            |Answer { header, kind, .. }| {
                devices.extend((kind == KIND).then_some(IfIndex(header.index.cast_unsigned())));
            },
        )?;
        Ok(devices)
    }

    /// Returns the filters of a device, in the order in which packets meet them; none if there is no device.
    pub(super) fn filters(&self, device: IfIndex, direction: Direction) -> io::Result<Vec<Filter>> {
        let mut message = TcMessage::default();
        message.header = header(device, parent(direction));
        let mut filters = Vec::new();
        self.socket.dump(
            RouteNetlinkMessage::GetTrafficFilter(message),
            |Answer { header, kind, chain }| {
                let id = FilterId { priority: (header.info >> 16) as u16, handle: header.handle };
                filters.push(Filter { id, kind, chain });
            },
        )?;
        Ok(filters)
    }

    /// Removes a filter. Returns false if there is none.
    pub(super) fn remove_filter(
        &self,
        device: IfIndex,
        direction: Direction,
        filter: FilterId,
    ) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, parent(direction));
        message.header.handle = filter.handle;
        message.header.info = u32::from(filter.priority) << 16 | ALL_PROTOCOLS;
        self.change(RouteNetlinkMessage::DelTrafficFilter(message))
    }

    /// Returns whether the queueing discipline in the place of clsact at a device is of that kind. (With the kind
    /// `ingress`, a filter for the way out would hang on the way in.)
    fn is_clsact(&self, device: IfIndex) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, TcHandle::CLSACT);
        // With this attribute the kernel finds no queueing discipline of another kind.
        message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
        self.change(RouteNetlinkMessage::GetQueueDiscipline(message))
    }

    /// Removes the clsact queueing discipline of a device, with all filters that hang on it. Returns false if there is
    /// none.
    fn remove_clsact(&self, device: IfIndex) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, TcHandle::CLSACT);
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        // The kernel removes the queueing discipline only if it is of this kind: `ingress` has the same place.
        message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
        self.change(RouteNetlinkMessage::DelQueueDiscipline(message))
    }

    fn change(&self, message: RouteNetlinkMessage) -> io::Result<bool> {
        self.socket.send(message, NLM_F_ACK)?;
        let mut done = false;
        self.socket.answers(|payload: NetlinkPayload<Answer>| {
            let NetlinkPayload::Error(answer) = payload else { return Ok(false) };
            if answer.code.is_none() {
                done = true;
                return Ok(true);
            }
            let error = answer.to_io();
            match error.raw_os_error() {
                // There is no such filter, queueing discipline or device, or it is of another kind.
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV) => Ok(true),
                _ => Err(error),
            }
        })?;
        Ok(done)
    }
}

/// Returns the identity of our filter.
pub(super) fn own_filter(direction: Direction) -> FilterId {
    FilterId { priority: priority(direction), handle: u32::from(HANDLE).into() }
}

fn header(device: IfIndex, parent: TcHandle) -> TcHeader {
    TcHeader { index: device.0.cast_signed(), parent, ..TcHeader::default() }
}

const fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    TcHandle { major: u16::MAX, minor }
}

/// Makes sure that a device has a clsact queueing discipline. One that is made here is noted as ours.
pub(super) fn make_clsact(
    notes: &Notes,
    device: &Device<'_>,
    program: &'static str,
) -> Result<(), AttachError> {
    let note = Note::Clsact(device.index);
    let pin = |error: PinError| AttachError::Pin {
        path: notes.path().to_path_buf(),
        source: io::Error::other(error),
    };
    // The note is written first, because the agent may die between the two steps.
    let new = notes.add(&note).map_err(pin)?;
    let made = tc::qdisc_add_clsact(device.name);
    if new && made.is_err() {
        notes.remove(&note).map_err(pin)?;
    }
    match made {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
            match TrafficControl::open().and_then(|control| control.is_clsact(device.index)) {
                Ok(true) => Ok(()),
                Ok(false) => Err(AttachError::Ingress { program }),
                Err(source) => Err(AttachError::Order { program, source }),
            }
        }
        made => made.map_err(|error| AttachError::Program { program, source: error.into() }),
    }
}

/// Removes our clsact filters from a device, if there are any. Also removes the clsact queueing discipline, if it is
/// ours and holds no other filter.
///
/// # Errors
///
/// Returns the kernel's error.
pub(crate) fn detach(pins: &PinDir, device: IfIndex) -> io::Result<()> {
    let control = TrafficControl::open()?;
    for direction in Direction::ALL {
        let own = own_filter(direction);
        if control.filters(device, direction)?.iter().any(|filter| filter.id == own) {
            control.remove_filter(device, direction, own)?;
        }
    }
    release(&control, &Notes::of(pins), device)
}

/// Removes the clsact queueing discipline of a device if a note says that it is ours and it holds no filter. If it
/// holds filters of others, the note stays. (A filter that somebody adds between the check and the removal is lost: the
/// kernel offers nothing better.)
fn release(control: &TrafficControl, notes: &Notes, device: IfIndex) -> io::Result<()> {
    let note = Note::Clsact(device);
    if !notes.has(&note) {
        return Ok(());
    }
    for direction in Direction::ALL {
        if !control.filters(device, direction)?.is_empty() {
            return Ok(());
        }
    }
    control.remove_clsact(device)?;
    notes.remove(&note).map_err(io::Error::other)
}
