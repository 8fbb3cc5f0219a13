//! Blocking netlink: a request, and the answers to it.

use std::io;

use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// A netlink socket to the network namespace in which it was opened.
pub(crate) struct Netlink(Socket);

impl Netlink {
    /// Opens a socket of a protocol, in the network namespace of the calling thread.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends a request.
    pub(crate) fn send(&self, message: impl NetlinkSerializable, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.0.send(&buffer, 0).map(drop)
    }

    /// Passes the answers to `each` until it returns that the last one has come.
    pub(crate) fn answers<A: NetlinkDeserializable>(
        &self,
        mut each: impl FnMut(NetlinkPayload<A>) -> io::Result<bool>,
    ) -> io::Result<()> {
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            for payload in payloads(&datagram) {
                if each(payload?)? {
                    return Ok(());
                }
            }
        }
    }

    /// Passes every entry that `message` asks for to `each`.
    pub(crate) fn dump<A: NetlinkDeserializable>(
        &self,
        message: impl NetlinkSerializable,
        mut each: impl FnMut(A),
    ) -> io::Result<()> {
        self.send(message, NLM_F_DUMP)?;
        self.answers(|payload| match payload {
            NetlinkPayload::InnerMessage(answer) => {
                each(answer);
                Ok(false)
            }
            NetlinkPayload::Error(error) => Err(error.to_io()),
            NetlinkPayload::Done(done) if done.code != 0 => {
                Err(io::Error::from_raw_os_error(done.code.saturating_abs()))
            }
            NetlinkPayload::Done(_) => Ok(true),
            NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => Ok(false),
        })
    }
}

/// Returns the payloads of the messages of one datagram; an error is the last item.
pub(crate) fn payloads<A: NetlinkDeserializable>(
    mut datagram: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkPayload<A>>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let message = NetlinkMessage::<A>::deserialize(datagram).map_err(io::Error::other);
        let len = message.as_ref().map_or(usize::MAX, |message| message.header.length as usize);
        datagram = len.checked_next_multiple_of(4).and_then(|len| datagram.get(len..)).unwrap_or_default();
        Some(message.map(|message| message.payload))
    })
}
