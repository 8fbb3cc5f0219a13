//! Listens in such a way that no client fills the queue of connections for all clients.
//!
//! The kernel keeps connections that are not accepted yet in one queue for each listening socket. When the queue is
//! full, a new client has to try again after a second, which is too late for a probe. So several sockets listen on an
//! address, and the kernel picks one by the client's address: a client that fills a queue fills it for few others.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use rustix::net::sockopt::set_socket_reuseport;
use tokio::net::{TcpListener, TcpSocket};

use crate::host::sys;

/// Number of sockets on one address.
const QUEUES: u32 = 16;
/// Number of connections that may wait for one socket.
const BACKLOG: u32 = 1_024;

/// Listens on `address`, even if another socket has left it only recently.
///
/// # Errors
///
/// When it cannot be bound: another program has it, or another agent.
pub(super) fn listen(address: SocketAddr) -> io::Result<Vec<TcpListener>> {
    listen_with(address, BACKLOG)
}

fn listen_with(address: SocketAddr, backlog: u32) -> io::Result<Vec<TcpListener>> {
    // The first socket shares the address with nobody. Once it has the address, only sockets of this process can join.
    let first = bound(address, false)?;
    let others = set_socket_reuseport(&first, true).map_err(io::Error::from).and_then(|()| {
        let address = first.local_addr()?;
        (1..QUEUES).map(|_| bound(address, true)).collect::<io::Result<Vec<_>>>()
    });
    let others = others.unwrap_or_else(|error| {
        tracing::debug!(%address, %error, "all clients wait in one queue");
        Vec::new()
    });
    // The kernel numbers the sockets in the order in which they begin to listen.
    let sockets = std::iter::once(first).chain(others);
    let listeners = sockets.map(|socket| socket.listen(backlog)).collect::<io::Result<Vec<_>>>()?;
    if let [first, _, ..] = &listeners[..]
        && let Err(error) = sys::spread_by_source(first.as_fd(), QUEUES)
    {
        // The kernel then picks by address and port.
        tracing::debug!(%address, %error, "a client waits in any queue");
    }
    Ok(listeners)
}

fn bound(address: SocketAddr, shared: bool) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    if shared {
        socket.set_reuseport(true)?;
    }
    socket.bind(address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use super::*;
    use crate::host::testing::{in_new_netns, ip};

    const PATIENCE: Duration = Duration::from_millis(500);

    /// Connects from this address, if the connection is accepted in time.
    async fn comes(from: IpAddr, to: SocketAddr) -> Option<tokio::net::TcpStream> {
        let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
        socket.bind((from, 0).into()).unwrap();
        tokio::time::timeout(PATIENCE, socket.connect(to)).await.ok()?.ok()
    }

    #[test]
    fn who_fills_a_queue_does_not_fill_that_of_others() {
        in_new_netns(|| {
            ip(
                "link set lo up\naddress add fd00:0:0:1::1/128 dev lo nodad\naddress add fd00:0:0:2::1/128 dev lo nodad\n",
            );
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                for (crowd, other, address) in [
                    ("127.0.0.2", "127.0.0.3", "127.0.0.1:0"),
                    ("fd00:0:0:1::1", "fd00:0:0:2::1", "[fd00:0:0:1::1]:0"),
                    ("127.0.0.2", "127.0.0.3", "[::]:0"),
                ] {
                    let listeners = listen_with(address.parse().unwrap(), 8).unwrap();
                    let mut to = listeners[0].local_addr().unwrap();
                    if to.ip().is_unspecified() {
                        to.set_ip("127.0.0.1".parse().unwrap());
                    }
                    let (crowd, other) = (crowd.parse().unwrap(), other.parse().unwrap());
                    let mut all = Vec::new();
                    while let Some(stream) = comes(crowd, to).await {
                        all.push(stream);
                        assert!(all.len() < 100, "{address}");
                    }
                    assert!(comes(other, to).await.is_some(), "{address}");
                }
            });
        });
    }

    #[tokio::test]
    async fn nobody_else_gets_the_address() {
        let listeners = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        assert_eq!(listeners.len(), QUEUES as usize);
        let address = listeners[0].local_addr().unwrap();
        assert_eq!(listen(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listeners);
        assert!(listen(address).is_ok());
    }
}
