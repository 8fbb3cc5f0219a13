//! The bytes of sock_diag: the requests we make and the answers we read (`linux/inet_diag.h`,
//! `linux/sock_diag.h`).
//!
//! netlink-packet-sock-diag 0.5 has the fixed parts; socket storage, in requests and in answers, is added here.

use std::os::fd::RawFd;

use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{SOCK_DESTROY, SOCK_DIAG_BY_FAMILY};
use proxy_common::abi::SocketRecord;
use rtnetlink::packet_core::{
    DecodeError, DefaultNla, Emitable as _, NLA_F_NESTED, NLA_HEADER_SIZE, NetlinkDeserializable,
    NetlinkHeader, NetlinkSerializable, NlasIterator, Parseable as _,
};

/// Attribute of a request: nested, which socket storage to list.
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
/// Inside it: the descriptor of a storage map.
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
/// Attribute of an answer: nested, one [`SK_DIAG_BPF_STORAGE`] for each map.
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
/// Inside it: nested, the id of the map and the socket's value.
const SK_DIAG_BPF_STORAGE: u16 = 1;
/// Inside that: the value.
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// Bytes of `struct inet_diag_msg`.
const ANSWER_LEN: usize = 72;

/// A socket that the kernel listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// AF_INET or AF_INET6, as the application made it.
    pub family: u8,
    /// Addresses, ports, device and cookie: all that destroying it needs.
    pub id: SocketId,
    /// Our record, if it has one and was asked for.
    pub record: Option<SocketRecord>,
}

/// What travels in either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// List the connected UDP sockets of a family, with their values in a storage map.
    List { request: InetRequest, storage: Option<DefaultNla> },
    /// Destroy one socket.
    Destroy(InetRequest),
    /// The kernel's answer to `List`.
    Found(Found),
}

impl Message {
    /// Asks for all connected UDP sockets of an address family, with the value each has in `storage`.
    pub(super) fn list(family: u8, storage: Option<RawFd>) -> Self {
        let id = if family == libc::AF_INET as u8 { SocketId::new_v4() } else { SocketId::new_v6() };
        Self::List { request: request(family, id), storage: storage.map(storage_of) }
    }

    /// Asks to destroy a socket: the one with this cookie and no other.
    pub(super) fn destroy(family: u8, id: SocketId) -> Self {
        Self::Destroy(request(family, id))
    }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    InetRequest {
        family,
        protocol: libc::IPPROTO_UDP as u8,
        extensions: ExtensionFlags::empty(),
        // A connected UDP socket has this state too.
        states: StateFlags::ESTABLISHED,
        socket_id,
    }
}

fn storage_of(map: RawFd) -> DefaultNla {
    let map = DefaultNla::new(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, map.to_ne_bytes().to_vec());
    let mut nested = vec![0; map.buffer_len()];
    map.emit(&mut nested);
    DefaultNla::new(INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED, nested)
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Self::List { .. } | Self::Found(_) => SOCK_DIAG_BY_FAMILY,
            Self::Destroy(_) => SOCK_DESTROY,
        }
    }

    fn buffer_len(&self) -> usize {
        match self {
            Self::List { request, storage } => {
                request.buffer_len() + storage.as_ref().map_or(0, |storage| storage.buffer_len())
            }
            Self::Destroy(request) => request.buffer_len(),
            // Only the kernel sends it.
            Self::Found(_) => 0,
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        match self {
            Self::List { request, storage } => {
                let (fixed, attributes) = buffer.split_at_mut(request.buffer_len());
                request.emit(fixed);
                if let Some(storage) = storage {
                    storage.emit(attributes);
                }
            }
            Self::Destroy(request) => request.emit(buffer),
            Self::Found(_) => {}
        }
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != SOCK_DIAG_BY_FAMILY {
            return Err(DecodeError::from(format!("unexpected message type {}", header.message_type)));
        }
        let fixed = InetResponseHeader::parse(payload)?;
        let record = record_in(payload.get(ANSWER_LEN..).unwrap_or_default())?;
        Ok(Self::Found(Found { family: fixed.family, id: fixed.socket_id, record }))
    }
}

/// The record among the attributes of an answer. One map was asked for, so there is one value at most.
fn record_in(attributes: &[u8]) -> Result<Option<SocketRecord>, DecodeError> {
    let Some(storages) = find(attributes, INET_DIAG_SK_BPF_STORAGES)? else { return Ok(None) };
    let Some(storage) = find(storages, SK_DIAG_BPF_STORAGE)? else { return Ok(None) };
    let Some(value) = find(storage, SK_DIAG_BPF_STORAGE_MAP_VALUE)? else { return Ok(None) };
    match bytemuck::try_pod_read_unaligned(value) {
        Ok(record) => Ok(Some(record)),
        Err(_wrong_size) => Err(DecodeError::from(format!(
            "a socket record has {} bytes, not {}",
            value.len(),
            size_of::<SocketRecord>()
        ))),
    }
}

fn find(attributes: &[u8], kind: u16) -> Result<Option<&[u8]>, DecodeError> {
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        if attribute.kind() == kind {
            let end = usize::from(attribute.length());
            return Ok(attribute.into_inner().get(NLA_HEADER_SIZE..end));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proxy_common::addr::Addr;
    use proxy_common::be::Be16;
    use rtnetlink::packet_core::NetlinkMessage;

    use super::*;

    fn bytes(message: Message) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        buffer
    }

    impl From<Message> for rtnetlink::packet_core::NetlinkPayload<Message> {
        fn from(message: Message) -> Self {
            Self::InnerMessage(message)
        }
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let attribute = DefaultNla::new(kind, value.to_vec());
        let mut buffer = vec![0; attribute.buffer_len()];
        attribute.emit(&mut buffer);
        buffer
    }

    fn record() -> SocketRecord {
        SocketRecord {
            vip: Addr::v4([10, 96, 0, 10]),
            backend_addr: Addr::v4([10, 64, 1, 11]),
            vip_port: Be16::new(53),
            backend_port: Be16::new(1053),
            service: 7,
            backend: 9,
        }
    }

    /// `struct inet_diag_msg` of a UDP socket 192.0.2.1:40000 -> 10.64.1.11:1053, by hand.
    fn answer(attributes: &[u8]) -> Vec<u8> {
        let mut bytes = vec![libc::AF_INET as u8, 1, 0, 0];
        bytes.extend(40000_u16.to_be_bytes());
        bytes.extend(1053_u16.to_be_bytes());
        bytes.extend([192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([10, 64, 1, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(3_u32.to_ne_bytes());
        bytes.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.extend([0; 20]);
        bytes.extend(attributes);
        bytes
    }

    fn read(payload: &[u8]) -> Result<Found, String> {
        let mut header = NetlinkHeader::default();
        header.message_type = SOCK_DIAG_BY_FAMILY;
        match Message::deserialize(&header, payload) {
            Ok(Message::Found(found)) => Ok(found),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_listing_names_the_storage_map() {
        let got = bytes(Message::list(libc::AF_INET6 as u8, Some(11)));
        assert_eq!(got.len(), 16 + 56 + 12);
        // nlmsg_type, then family, protocol, extensions, pad, states of inet_diag_req_v2.
        assert_eq!(got[4..6], 20_u16.to_ne_bytes());
        assert_eq!(got[16..20], [libc::AF_INET6 as u8, libc::IPPROTO_UDP as u8, 0, 0]);
        assert_eq!(got[20..24], (1_u32 << 1).to_ne_bytes());
        let nested = [&12_u16.to_ne_bytes()[..], &0x8002_u16.to_ne_bytes()].concat();
        let map = [&8_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &11_u32.to_ne_bytes()].concat();
        assert_eq!(got[72..], [nested, map].concat());

        assert_eq!(bytes(Message::list(libc::AF_INET as u8, None)).len(), 16 + 56);
    }

    #[test]
    fn what_is_found_is_what_is_destroyed() {
        let answer = answer(&[]);
        let found = read(&answer).unwrap();
        assert_eq!(found.id.destination_address, "10.64.1.11".parse::<IpAddr>().unwrap());
        assert_eq!((found.id.source_port, found.id.destination_port), (40000, 1053));
        assert_eq!(found.record, None);
        let got = bytes(Message::destroy(found.family, found.id));
        assert_eq!(got[4..6], 21_u16.to_ne_bytes());
        // struct inet_diag_sockid: the very bytes that the kernel sent, cookie included.
        assert_eq!(got[24..72], answer[4..52]);
    }

    #[test]
    fn the_record_is_read_from_nested_attributes() {
        let storage = [
            attribute(2, &77_u32.to_ne_bytes()),
            // SK_DIAG_BPF_STORAGE_PAD, which the kernel puts in to align the value.
            attribute(1, &[]),
            attribute(SK_DIAG_BPF_STORAGE_MAP_VALUE, bytemuck::bytes_of(&record())),
        ]
        .concat();
        let storages = attribute(SK_DIAG_BPF_STORAGE | NLA_F_NESTED, &storage);
        let attributes =
            [attribute(8, &[0]), attribute(INET_DIAG_SK_BPF_STORAGES | NLA_F_NESTED, &storages)].concat();
        assert_eq!(read(&answer(&attributes)).unwrap().record, Some(record()));
    }

    #[test]
    fn a_socket_without_a_value_has_no_record() {
        assert_eq!(read(&answer(&attribute(8, &[0]))).unwrap().record, None);
        let empty = attribute(INET_DIAG_SK_BPF_STORAGES | NLA_F_NESTED, &[]);
        assert_eq!(read(&answer(&empty)).unwrap().record, None);
    }

    #[test]
    fn broken_answers_are_errors() {
        let value = attribute(SK_DIAG_BPF_STORAGE_MAP_VALUE, &[0; 43]);
        let storages = attribute(SK_DIAG_BPF_STORAGE | NLA_F_NESTED, &value);
        let short = attribute(INET_DIAG_SK_BPF_STORAGES | NLA_F_NESTED, &storages);
        assert_eq!(read(&answer(&short)).unwrap_err(), "a socket record has 43 bytes, not 44");
        let whole = answer(&attribute(INET_DIAG_SK_BPF_STORAGES, &[0; 8]));
        for len in 0..ANSWER_LEN {
            assert!(read(&whole[..len]).is_err(), "{len} bytes");
        }
        assert!(read(&whole[..whole.len() - 3]).is_err());
    }
}
