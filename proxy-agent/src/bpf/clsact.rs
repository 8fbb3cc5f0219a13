//! Filters and the queueing discipline that they hang on, of kernels without TCX (before 6.6) and by `--no-tcx`.
//!
//! One clsact queueing discipline of a device holds everybody's filters. It is ours only where a note says so
//! ([`super::notes`]), and goes only when it holds nothing any more.

use std::collections::BTreeSet;
use std::io;

use aya::programs::tc::{self, TcError};
use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlasIterator, parse_string,
    parse_u32,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::notes::{Note, Notes};
use super::pins::{PinDir, PinError};
use super::tc::{AttachError, Device, Direction};
use crate::host::netlink::Netlink;

const KIND: &str = "clsact";

/// `htons(ETH_P_ALL)`, as filters name it.
const ALL_PROTOCOLS: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;

/// Attributes of linux/rtnetlink.h.
const TCA_KIND: u16 = 1;
const TCA_CHAIN: u16 = 11;

/// Priority of clsact filters: before everybody on ingress, behind everybody on egress.
pub(super) const fn priority(direction: Direction) -> u16 {
    match direction {
        Direction::Ingress => 1,
        Direction::Egress => u16::MAX,
    }
}

/// Handle of clsact filters: "VIPR".
pub(super) const HANDLE: tc::TcHandle = tc::TcHandle::new(0x5649, 0x5052);

/// What names a filter of a device in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FilterId {
    pub(super) priority: u16,
    pub(super) handle: TcHandle,
}

/// A filter, or what the kernel keeps beside filters of one priority.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) id: FilterId,
    /// `bpf`, `u32`, `flower` and so on.
    pub(super) kind: String,
    /// Packets begin with chain 0, and go to another one only where a filter sends them.
    pub(super) chain: u32,
}

/// A netlink socket to the network namespace in which it was opened.
pub(super) struct TrafficControl {
    socket: Netlink,
}

/// An answer, as far as it matters: what is in filters need not be understood.
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
    /// Opens one.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: Netlink::open(NETLINK_ROUTE)? })
    }

    /// The devices with a clsact queueing discipline. (One of the kind `ingress` answers a question for filters of either
    /// direction with those on the way in.)
    pub(super) fn devices(&self) -> io::Result<BTreeSet<u32>> {
        let mut devices = BTreeSet::new();
        self.socket.dump(
            RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
            |Answer { header, kind, .. }| {
                devices.extend((kind == KIND).then_some(header.index.cast_unsigned()));
            },
        )?;
        Ok(devices)
    }

    /// The filters of a device, in the order in which packets meet them; none if there is no device.
    pub(super) fn filters(&self, device: u32, direction: Direction) -> io::Result<Vec<Filter>> {
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

    /// Removes a filter. False if there is none.
    pub(super) fn remove_filter(
        &self,
        device: u32,
        direction: Direction,
        filter: FilterId,
    ) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, parent(direction));
        message.header.handle = filter.handle;
        message.header.info = u32::from(filter.priority) << 16 | ALL_PROTOCOLS;
        self.change(RouteNetlinkMessage::DelTrafficFilter(message))
    }

    /// Whether what has the place of clsact at a device is of that kind. (A filter on the way out would hang on the way in of
    /// one of the kind `ingress`.)
    fn is_clsact(&self, device: u32) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, TcHandle::CLSACT);
        // The kernel finds no other.
        message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
        self.change(RouteNetlinkMessage::GetQueueDiscipline(message))
    }

    /// Removes the clsact queueing discipline of a device, with all that hangs on it. False if there is none.
    fn remove_clsact(&self, device: u32) -> io::Result<bool> {
        let mut message = TcMessage::default();
        message.header = header(device, TcHandle::CLSACT);
        message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        // The kernel removes it only if it is of this kind: `ingress` has the same place.
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
                // No such filter, queueing discipline or device, or one of another kind.
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV) => Ok(true),
                _ => Err(error),
            }
        })?;
        Ok(done)
    }
}

/// What names our filter.
pub(super) fn own_filter(direction: Direction) -> FilterId {
    FilterId { priority: priority(direction), handle: u32::from(HANDLE).into() }
}

fn header(device: u32, parent: TcHandle) -> TcHeader {
    TcHeader { index: device.cast_signed(), parent, ..TcHeader::default() }
}

const fn parent(direction: Direction) -> TcHandle {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    TcHandle { major: u16::MAX, minor }
}

/// Puts the clsact queueing discipline of a device in place. Where there was none, it is noted as ours.
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
    // Before it is there: whoever dies in between has made it.
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

/// Removes our clsact filters from a device, if there are any, and the clsact queueing discipline, if that is ours and
/// nobody else's filter is on it.
///
/// # Errors
///
/// What the kernel says.
pub fn detach(pins: &PinDir, device: u32) -> io::Result<()> {
    let control = TrafficControl::open()?;
    for direction in Direction::ALL {
        let own = own_filter(direction);
        if control.filters(device, direction)?.iter().any(|filter| filter.id == own) {
            control.remove_filter(device, direction, own)?;
        }
    }
    release(&control, &Notes::of(pins), device)
}

/// Removes the clsact queueing discipline of a device if a note says that it is ours and nothing hangs on it; with one of
/// ours that others have filters on, the note stays. (Who adds a filter between the look and the removal loses it: the
/// kernel offers nothing better.)
fn release(control: &TrafficControl, notes: &Notes, device: u32) -> io::Result<()> {
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
