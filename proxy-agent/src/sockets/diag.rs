//! A sock_diag socket: one question, its answers.

use std::io;
use std::os::fd::RawFd;

use netlink_packet_sock_diag::inet::SocketId;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{Socket, SocketAddr};

use super::SocketsError;
use super::message::{Found, Message};

const LISTING: &str = "listing connected UDP sockets";
const DESTROYING: &str = "destroying a socket";

/// A sock_diag socket of the network namespace in which it was opened.
pub(super) struct Diag {
    socket: Socket,
}

impl Diag {
    pub(super) fn open() -> Result<Self, SocketsError> {
        let failed = |source| SocketsError::Diag { what: "opening a netlink socket", source };
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Whether the kernel knows both requests, found out by two that cannot succeed.
    pub(super) fn probe(&self) -> Result<(), SocketsError> {
        // A kernel that looks at the attribute refuses a descriptor that nobody has.
        match self.list(libc::AF_INET as u8, Some(-1), |_| {}) {
            Err(SocketsError::Diag { source, .. }) if source.raw_os_error() == Some(libc::EBADF) => {}
            Err(error) => return Err(error),
            Ok(()) => return Err(SocketsError::NoStorageListing),
        }
        // No socket has the cookie 0.
        let nobody = Found { family: libc::AF_INET as u8, id: SocketId::new_v4(), record: None };
        self.destroy(&nobody).map(drop)
    }

    /// Calls `each` for every connected UDP socket of an address family, with its value in the map `storage`.
    pub(super) fn list(
        &self,
        family: u8,
        storage: Option<RawFd>,
        mut each: impl FnMut(Found),
    ) -> Result<(), SocketsError> {
        let failed = |source| SocketsError::Diag { what: LISTING, source };
        self.send(Message::list(family, storage), NLM_F_DUMP).map_err(failed)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(failed)?;
            for message in messages(&datagram, LISTING) {
                match message? {
                    NetlinkPayload::InnerMessage(Message::Found(found)) => each(found),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(()),
                    NetlinkPayload::Done(done) => {
                        return Err(failed(io::Error::from_raw_os_error(done.code.saturating_abs())));
                    }
                    NetlinkPayload::Error(error) => return Err(failed(error.to_io())),
                    NetlinkPayload::InnerMessage(_)
                    | NetlinkPayload::Noop
                    | NetlinkPayload::Overrun(_)
                    | _ => {}
                }
            }
        }
    }

    /// Destroys the socket; `false` if it is gone already, or is not the same any more.
    pub(super) fn destroy(&self, found: &Found) -> Result<bool, SocketsError> {
        let failed = |source| SocketsError::Diag { what: DESTROYING, source };
        self.send(Message::destroy(found.family, found.id.clone()), NLM_F_ACK).map_err(failed)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(failed)?;
            for message in messages(&datagram, DESTROYING) {
                let NetlinkPayload::Error(answer) = message? else { continue };
                if answer.code.is_none() {
                    return Ok(true);
                }
                let error = answer.to_io();
                return match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ESTALE) => Ok(false),
                    Some(libc::EOPNOTSUPP) => Err(SocketsError::NoDestroy),
                    _ => Err(failed(error)),
                };
            }
        }
    }

    fn send(&self, message: Message, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop)
    }
}

/// The messages of one datagram.
fn messages(
    mut datagram: &[u8],
    what: &'static str,
) -> impl Iterator<Item = Result<NetlinkPayload<Message>, SocketsError>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        match NetlinkMessage::<Message>::deserialize(datagram) {
            Ok(message) => {
                let len = (message.header.length as usize).next_multiple_of(4);
                datagram = datagram.get(len..).unwrap_or_default();
                Some(Ok(message.payload))
            }
            Err(error) => {
                datagram = &[];
                Some(Err(SocketsError::Answer { what, reason: error.to_string() }))
            }
        }
    })
}
