//! The addresses of this host, by rtnetlink: all addresses of the agent's network namespace, loopback included. They
//! are read again as soon as the kernel reports a change. Until an address is known, connections to a nodePort on it go
//! to a process that listens there.
//!
//! An IPv6 address that is still being probed for duplicates is listed: nothing reaches it before the probe ends, and
//! by then the agent knows it. An address that turned out to be another machine's is not listed.
//!
//! Addresses that the kernel takes for local, but that are on no interface (a `local` route for a whole prefix, the
//! rest of 127.0.0.0/8), are not listed.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::TryStreamExt as _;
use proxy_common::abi::IfIndex;
use proxy_common::addr::Addr;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::{Handle, MulticastGroup};
use rustix::net::netdevice::index_to_name;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::sync::watch;

use super::follow::{FollowError, RECEIVE_BUFFER, Subject, follow};

/// Addresses, each with the index of a device that has it.
pub(crate) type HostAddresses = BTreeMap<Addr, IfIndex>;

/// Follows the addresses of the calling thread's network namespace, at once and after each change. Following ends when
/// every receiver is dropped.
///
/// # Errors
///
/// Returns an error if the first list cannot be read.
pub(crate) async fn watch_addresses() -> Result<watch::Receiver<HostAddresses>, FollowError> {
    watch_with_buffer(RECEIVE_BUFFER).await
}

async fn watch_with_buffer(receive_buffer: usize) -> Result<watch::Receiver<HostAddresses>, FollowError> {
    let groups = &[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let settle = Duration::ZERO;
    follow(Subject { what: "this host's addresses", groups, settle, receive_buffer }, dump).await
}

async fn dump(handle: Handle) -> Result<HostAddresses, rtnetlink::Error> {
    let messages = handle.address().get().execute();
    messages
        .try_fold(HostAddresses::new(), |mut addresses, message| {
            addresses.extend(own(&message));
            std::future::ready(Ok(addresses))
        })
        .await
}

/// Returns an address that this host may use, and its device.
fn own(message: &AddressMessage) -> Option<(Addr, IfIndex)> {
    let duplicate = message.header.flags.contains(AddressHeaderFlags::Dadfailed);
    Some((address_of(message).filter(|_| !duplicate)?, IfIndex(message.header.index)))
}

/// Returns this host's address of a message. On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL is ours;
/// elsewhere IPv6 has IFA_ADDRESS only.
pub(crate) fn address_of(message: &AddressMessage) -> Option<Addr> {
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

/// Returns the name of a device of the calling thread's network namespace; `None` if it is gone.
pub(crate) fn device_name(index: IfIndex) -> Option<String> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    socket.and_then(|socket| index_to_name(socket, index.0)).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;
    use std::time::Instant;

    use super::*;
    use crate::host::testing::{in_new_netns, ip};

    fn addr(s: &str) -> Addr {
        s.parse::<IpAddr>().unwrap().into()
    }

    async fn wait_for(addresses: &mut watch::Receiver<HostAddresses>, want: &BTreeSet<Addr>) {
        let wait = addresses.wait_for(|got| got.keys().eq(want));
        if tokio::time::timeout(Duration::from_secs(10), wait).await.is_err() {
            assert_eq!(addresses.borrow().keys().copied().collect::<BTreeSet<_>>(), *want);
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

    /// Neither an address that comes or goes nor a device that comes with an address is delayed. The fastest of several
    /// rounds is compared, so that a busy machine does not matter. (It was 50 ms and more.)
    #[test]
    fn a_change_is_known_as_soon_as_the_kernel_tells() {
        const ROUNDS: usize = 20;
        in_new_netns(|| {
            ip("link set lo up\nlink add up0 type veth peer name far0\nlink set up0 up\n");
            block_on(async {
                let mut addresses = watch_addresses().await.unwrap();
                let mut took: [Vec<Duration>; 5] = Default::default();
                for _ in 0..ROUNDS {
                    for (took, (lines, device, appears)) in took.iter_mut().zip([
                        ("addr add 192.0.2.10/24 dev up0\n", "192.0.2.10", true),
                        ("addr add 2001:db8::10/64 dev up0 nodad\n", "2001:db8::10", true),
                        ("addr del 192.0.2.10/24 dev up0\n", "192.0.2.10", false),
                        ("addr del 2001:db8::10/64 dev up0\n", "2001:db8::10", false),
                        (
                            "link add new0 type veth peer name new1\naddr add 192.0.2.20/24 dev new0\n",
                            "192.0.2.20",
                            true,
                        ),
                    ]) {
                        let start = Instant::now();
                        // `ip` runs in the namespace of the thread that starts it.
                        let changing = std::thread::spawn(move || ip(lines));
                        let known = addresses.wait_for(|got| got.contains_key(&addr(device)) == appears);
                        tokio::time::timeout(Duration::from_secs(10), known).await.unwrap().unwrap();
                        took.push(start.elapsed());
                        changing.join().unwrap();
                    }
                    ip("link del new0\n");
                    let gone = addresses.wait_for(|got| !got.contains_key(&addr("192.0.2.20")));
                    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap().unwrap();
                }
                for mut took in took {
                    took.sort();
                    let (fastest, median) = (took[0], took[ROUNDS / 2]);
                    eprintln!("fastest {fastest:?}, median {median:?} of {ROUNDS}, with starting `ip`");
                    assert!(fastest < Duration::from_millis(45), "{took:?}");
                }
            });
        });
    }

    #[test]
    fn an_address_that_another_machine_has_is_not_ours() {
        let tentative = AddressHeaderFlags::Tentative;
        let ours = Some((addr("2001:db8::10"), IfIndex(7)));
        assert_eq!(own(&message(AddressHeaderFlags::Permanent)), ours);
        assert_eq!(own(&message(tentative)), ours);
        assert_eq!(own(&message(tentative | AddressHeaderFlags::Dadfailed)), None);
    }

    fn message(flags: AddressHeaderFlags) -> AddressMessage {
        let mut message = AddressMessage::default();
        (message.header.index, message.header.flags) = (7, flags);
        message.attributes.push(AddressAttribute::Address("2001:db8::10".parse().unwrap()));
        message
    }

    #[test]
    fn an_overflow_of_notifications_loses_nothing() {
        in_new_netns(|| {
            ip("link set lo up\n");
            block_on(async {
                let mut addresses = watch_with_buffer(1).await.unwrap();
                let flood: String = (1..=200).map(|n| format!("addr add 192.0.2.{n}/32 dev lo\n")).collect();
                // This call blocks the runtime: nobody reads meanwhile, and the smallest buffer holds few of the 200
                // notifications.
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

    fn tasks() -> usize {
        tokio::runtime::Handle::current().metrics().num_alive_tasks()
    }
}
