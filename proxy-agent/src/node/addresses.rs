//! The addresses of this host, by rtnetlink: all of the agent's network namespace, loopback included.
//!
//! A notification only says *that* something changed; the truth is read by a new dump. So a lost notification
//! (ENOBUFS when the receive buffer overflows) costs nothing: it is a notification as well. Dumps use a socket of
//! their own, which no flood of notifications can disturb.
//!
//! What the kernel takes for local without an address on any interface (a `local` route for a whole prefix, the
//! rest of 127.0.0.0/8) is not listed.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use proxy_common::addr::Addr;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::sys::{AsyncSocket as _, SocketAddr};
use rtnetlink::{MulticastGroup, new_connection, new_multicast_connection};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Notifications come in bursts (an interface with all its addresses): one dump answers a whole burst.
const SETTLE: Duration = Duration::from_millis(50);
/// A dump takes milliseconds; one that takes this long will never end.
const DUMP_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a broken connection to the kernel is made anew.
const RETRY: Duration = Duration::from_secs(1);
/// Bytes of notifications that may wait. The kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 256 * 1024;

/// Why the host's addresses cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum AddressesError {
    /// No rtnetlink socket.
    #[error("cannot open an rtnetlink socket to read this host's addresses: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused the dump.
    #[error("cannot list this host's addresses over rtnetlink: {0}")]
    Dump(#[source] rtnetlink::Error),
    /// The dump did not end.
    #[error("listing this host's addresses over rtnetlink did not end within {DUMP_TIMEOUT:?}")]
    Timeout,
    /// The connection for notifications ended.
    #[error("the rtnetlink connection that reports address changes has ended")]
    Ended,
}

/// The addresses of the calling thread's network namespace, at once and after each change. Following ends when
/// every receiver is dropped; a broken connection is made anew, for ever, with a log line.
///
/// # Errors
///
/// When the first list cannot be read.
pub async fn watch_addresses() -> Result<watch::Receiver<BTreeSet<Addr>>, AddressesError> {
    watch_with_buffer(RECEIVE_BUFFER).await
}

async fn watch_with_buffer(receive_buffer: usize) -> Result<watch::Receiver<BTreeSet<Addr>>, AddressesError> {
    let feed = Feed::open(receive_buffer)?;
    let (sender, receiver) = watch::channel(feed.dump().await?);
    tokio::spawn(async move {
        let ended = sender.closed();
        tokio::select! {
            () = ended => {}
            () = follow(feed, receive_buffer, &sender) => {}
        }
    });
    Ok(receiver)
}

async fn follow(mut feed: Feed, receive_buffer: usize, sender: &watch::Sender<BTreeSet<Addr>>) {
    loop {
        let Err(error) = feed.follow(sender).await;
        tracing::warn!(%error, retry_in = ?RETRY, "lost track of this host's addresses");
        feed = loop {
            tokio::time::sleep(RETRY).await;
            match reopen(receive_buffer, sender).await {
                Ok(feed) => break feed,
                Err(error) => {
                    tracing::warn!(%error, retry_in = ?RETRY, "cannot follow this host's addresses")
                }
            }
        };
        tracing::info!("following this host's addresses again");
    }
}

async fn reopen(
    receive_buffer: usize,
    sender: &watch::Sender<BTreeSet<Addr>>,
) -> Result<Feed, AddressesError> {
    let feed = Feed::open(receive_buffer)?;
    deliver(feed.dump().await?, sender);
    Ok(feed)
}

/// Two sockets: one that hears of changes, one that reads the whole.
struct Feed {
    changes: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    dumps: rtnetlink::Handle,
    /// Drives both sockets; aborted on drop.
    _connections: JoinSet<()>,
}

impl Feed {
    fn open(receive_buffer: usize) -> Result<Self, AddressesError> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (mut notifying, _, changes) = new_multicast_connection(&groups).map_err(AddressesError::Open)?;
        notifying.socket_mut().socket_mut().set_rx_buf_sz(receive_buffer).map_err(AddressesError::Open)?;
        let (dumping, dumps, _) = new_connection().map_err(AddressesError::Open)?;
        let mut connections = JoinSet::new();
        connections.spawn(notifying);
        connections.spawn(dumping);
        Ok(Self { changes, dumps, _connections: connections })
    }

    async fn dump(&self) -> Result<BTreeSet<Addr>, AddressesError> {
        let messages = self.dumps.address().get().execute().map_err(AddressesError::Dump);
        let addresses = messages.try_fold(BTreeSet::new(), |mut addresses, message| {
            addresses.extend(address_of(&message));
            std::future::ready(Ok(addresses))
        });
        match tokio::time::timeout(DUMP_TIMEOUT, addresses).await {
            Ok(addresses) => addresses,
            Err(_elapsed) => Err(AddressesError::Timeout),
        }
    }

    /// Delivers the whole set after each change, until the connection breaks.
    async fn follow(
        &mut self,
        sender: &watch::Sender<BTreeSet<Addr>>,
    ) -> Result<std::convert::Infallible, AddressesError> {
        while self.changes.next().await.is_some() {
            tokio::time::sleep(SETTLE).await;
            // What waits by now happened before the dump that follows.
            while let Some(Some(_)) = self.changes.next().now_or_never() {}
            deliver(self.dump().await?, sender);
        }
        Err(AddressesError::Ended)
    }
}

fn deliver(addresses: BTreeSet<Addr>, sender: &watch::Sender<BTreeSet<Addr>>) {
    sender.send_if_modified(|known| {
        let changed = *known != addresses;
        if changed {
            tracing::debug!(addresses = addresses.len(), "this host's addresses changed");
            *known = addresses;
        }
        changed
    });
}

/// On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL is ours; elsewhere IPv6 has IFA_ADDRESS only.
fn address_of(message: &AddressMessage) -> Option<Addr> {
    let mut address = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(local) = attribute {
            return Some((*local).into());
        }
        if let AddressAttribute::Address(addr) = attribute {
            address = Some((*addr).into());
        }
    }
    address
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::IpAddr;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::node::testing::in_new_netns;

    fn addr(s: &str) -> Addr {
        s.parse::<IpAddr>().unwrap().into()
    }

    /// Runs `ip -batch` in the namespace of this thread.
    fn ip(lines: &str) {
        let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "ip -batch failed on:\n{lines}");
    }

    async fn wait_for(addresses: &mut watch::Receiver<BTreeSet<Addr>>, want: &BTreeSet<Addr>) {
        let wait = addresses.wait_for(|got| got == want);
        if tokio::time::timeout(Duration::from_secs(10), wait).await.is_err() {
            assert_eq!(*addresses.borrow(), *want);
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn both_families_are_listed_and_followed() {
        in_new_netns(|| {
            ip("link set lo up\n");
            block_on(async {
                let mut addresses = watch_addresses().await.unwrap();
                let mut want: BTreeSet<Addr> = ["127.0.0.1", "::1"].map(addr).into();
                wait_for(&mut addresses, &want).await;

                ip("addr add 192.0.2.10/24 dev lo\naddr add 2001:db8:1::10/64 dev lo\n");
                want.extend(["192.0.2.10", "2001:db8:1::10"].map(addr));
                wait_for(&mut addresses, &want).await;

                ip("addr del 192.0.2.10/24 dev lo\n");
                want.remove(&addr("192.0.2.10"));
                wait_for(&mut addresses, &want).await;

                ip("addr del 2001:db8:1::10/64 dev lo\n");
                want.remove(&addr("2001:db8:1::10"));
                wait_for(&mut addresses, &want).await;
            });
        });
    }

    #[test]
    fn of_a_point_to_point_address_ours_counts() {
        in_new_netns(|| {
            ip(
                "addr add 192.0.2.10 peer 192.0.2.99 dev lo\naddr add 2001:db8::10 peer 2001:db8::99 dev lo\n",
            );
            block_on(async {
                let mut addresses = watch_addresses().await.unwrap();
                wait_for(&mut addresses, &["192.0.2.10", "2001:db8::10"].map(addr).into()).await;
            });
        });
    }

    #[test]
    fn an_overflow_of_notifications_loses_nothing() {
        in_new_netns(|| {
            ip("link set lo up\n");
            block_on(async {
                let mut addresses = watch_with_buffer(1).await.unwrap();
                let flood: String = (1..=200).map(|n| format!("addr add 192.0.2.{n}/32 dev lo\n")).collect();
                // This blocks the runtime: nobody reads meanwhile, and the smallest buffer holds few of 200.
                ip(&flood);
                let mut want: BTreeSet<Addr> = (1..=200).map(|n| Addr::v4([192, 0, 2, n])).collect();
                want.extend(["127.0.0.1", "::1"].map(addr));
                wait_for(&mut addresses, &want).await;

                ip("addr del 192.0.2.200/32 dev lo\n");
                want.remove(&addr("192.0.2.200"));
                wait_for(&mut addresses, &want).await;
            });
        });
    }

    #[test]
    fn following_ends_with_the_last_receiver() {
        in_new_netns(|| {
            block_on(async {
                let addresses = watch_addresses().await.unwrap();
                let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
                assert!(tasks() > 0);
                drop(addresses);
                tokio::time::timeout(Duration::from_secs(5), async {
                    while tasks() > 0 {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                })
                .await
                .unwrap();
            });
        });
    }
}
