//! A sock_diag socket: lists connected sockets of one network namespace and destroys sockets there.
//!
//! The socket belongs to the namespace in which it was opened, wherever its thread goes afterwards.

use std::io;

use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::packet_core::{NLM_F_ACK, NetlinkPayload};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use crate::host::netlink::Netlink;
use crate::host::sockets::error::SocketsError;

/// A sock_diag socket.
pub(super) struct Diag(Netlink);

impl Diag {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, SocketsError> {
        Netlink::open(NETLINK_SOCK_DIAG)
            .map(Self)
            .map_err(|source| failed("opening a netlink socket", source))
    }

    /// Checks that the kernel can list and destroy sockets, by requests that match no socket.
    pub(super) fn probe(&self) -> Result<(), SocketsError> {
        // No socket has the cookie 0.
        self.destroy(libc::AF_INET as u8, SocketId::new_v4()).map(drop)
    }

    /// Calls `each` for every connected UDP socket of both families.
    pub(super) fn list(&self, each: impl FnMut(InetResponseHeader)) -> Result<(), SocketsError> {
        self.list_by(request, each)
    }

    /// Calls `each` for every TCP socket of both families that has begun to connect and is not closed: sockets of
    /// processes, the kernel's own, and subflows of MPTCP.
    pub(super) fn list_tcp(&self, each: impl FnMut(InetResponseHeader)) -> Result<(), SocketsError> {
        self.list_by(
            |family, socket_id| InetRequest {
                protocol: libc::IPPROTO_TCP as u8,
                states: StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT,
                ..request(family, socket_id)
            },
            each,
        )
    }

    fn list_by(
        &self,
        request: impl Fn(u8, SocketId) -> InetRequest,
        mut each: impl FnMut(InetResponseHeader),
    ) -> Result<(), SocketsError> {
        for (family, any) in [(libc::AF_INET, SocketId::new_v4()), (libc::AF_INET6, SocketId::new_v6())] {
            let message = SockDiagMessage::InetRequest(request(family as u8, any));
            let listed = self.0.dump(message, |answer| {
                if let SockDiagMessage::InetResponse(found) = answer {
                    each(found.header);
                }
            });
            listed.map_err(|source| failed("listing connected sockets", source))?;
        }
        Ok(())
    }

    /// Destroys the socket with this identity, cookie included. Returns `false` if there is none any more.
    pub(super) fn destroy(&self, family: u8, id: SocketId) -> Result<bool, SocketsError> {
        let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request(family, id)));
        let asked = self.0.send(request, NLM_F_ACK).and_then(|()| {
            self.0.answers(|payload: NetlinkPayload<SockDiagMessage>| match payload {
                NetlinkPayload::Error(answer) if answer.code.is_none() => Ok(true),
                NetlinkPayload::Error(answer) => Err(answer.to_io()),
                NetlinkPayload::InnerMessage(_)
                | NetlinkPayload::Noop
                | NetlinkPayload::Done(_)
                | NetlinkPayload::Overrun(_)
                | _ => Ok(false),
            })
        });
        match asked {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT | libc::ESTALE) => Ok(false),
                Some(libc::EOPNOTSUPP) => Err(SocketsError::NoDestroy),
                _ => Err(failed("destroying a socket", error)),
            },
        }
    }
}

fn failed(what: &'static str, source: io::Error) -> SocketsError {
    SocketsError::Diag { what, source }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    InetRequest {
        family,
        protocol: libc::IPPROTO_UDP as u8,
        extensions: ExtensionFlags::empty(),
        // Connected UDP sockets have this state too.
        states: StateFlags::ESTABLISHED,
        socket_id,
    }
}

/// Returns the cookie of a socket in the form of SO_COOKIE: the kernel sends the low half first.
pub(super) fn cookie(id: &SocketId) -> u64 {
    let [a, b, c, d, e, f, g, h] = id.cookie;
    u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::NetlinkSerializable;

    use super::*;
    use crate::host::netlink::payloads;

    /// Returns a list of two connected UDP sockets in the kernel's format, written by hand.
    fn datagram() -> Vec<u8> {
        let mut bytes = Vec::new();
        for port in [1053_u16, 1054] {
            bytes.extend(88_u32.to_ne_bytes().into_iter().chain(20_u16.to_ne_bytes()));
            // NLM_F_MULTI; sequence number and port id.
            bytes.extend(2_u16.to_ne_bytes().into_iter().chain([0; 8]));
            // struct inet_diag_msg: family, state, timer, retransmits; ports, addresses, device, cookie.
            bytes.extend([libc::AF_INET as u8, 1, 0, 0]);
            bytes.extend(40000_u16.to_be_bytes().into_iter().chain(port.to_be_bytes()));
            bytes.extend([192, 0, 2, 1].into_iter().chain([0; 12]));
            bytes.extend([10, 64, 1, 11].into_iter().chain([0; 12]));
            bytes.extend(0_u32.to_ne_bytes());
            bytes.extend(0x1234_5678_u32.to_ne_bytes().into_iter().chain(9_u32.to_ne_bytes()));
            // Expiry, queues, uid, inode.
            bytes.extend([0; 16].into_iter().chain(77_u32.to_ne_bytes()));
        }
        bytes
    }

    fn headers(datagram: &[u8]) -> io::Result<Vec<InetResponseHeader>> {
        payloads(datagram)
            .map(|payload| {
                let payload = payload?;
                let NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) = payload else {
                    panic!("{payload:?}")
                };
                Ok(found.header)
            })
            .collect()
    }

    #[test]
    fn a_datagram_holds_several_sockets() {
        let found = headers(&datagram()).unwrap();
        let ports: Vec<u16> = found.iter().map(|found| found.socket_id.destination_port).collect();
        assert_eq!(ports, [1053, 1054]);
        assert_eq!(found[0].inode, 77);
        assert_eq!(cookie(&found[0].socket_id), 9 << 32 | 0x1234_5678);
    }

    #[test]
    fn a_broken_datagram_is_an_error_not_an_endless_loop() {
        let whole = datagram();
        for len in (1..88).chain(89..176) {
            assert!(headers(&whole[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn a_request_to_destroy_carries_the_identity_that_was_listed() {
        let found = headers(&datagram()).unwrap();
        let message = SockDiagMessage::InetRequest(request(found[0].family, found[0].socket_id.clone()));
        let mut bytes = vec![0; NetlinkSerializable::buffer_len(&message)];
        message.serialize(&mut bytes);
        assert_eq!(bytes.len(), 56);
        assert_eq!(bytes[..4], [libc::AF_INET as u8, libc::IPPROTO_UDP as u8, 0, 0]);
        assert_eq!(bytes[4..8], (1_u32 << 1).to_ne_bytes());
        assert_eq!(bytes[8..], datagram()[20..68]);
    }
}
