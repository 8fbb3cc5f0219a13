//! The addresses of this host, by rtnetlink: all of the agent's network namespace, loopback included.
//!
//! What the kernel takes for local without an address on any interface (a `local` route for a whole prefix, the
//! rest of 127.0.0.0/8) is not listed.

use std::collections::BTreeSet;

use futures::TryStreamExt as _;
use proxy_common::addr::Addr;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;

use super::follow::{FollowError, RECEIVE_BUFFER, Subject, follow};

/// The addresses of the calling thread's network namespace, at once and after each change. Following ends when
/// every receiver is dropped.
///
/// # Errors
///
/// When the first list cannot be read.
pub async fn watch_addresses() -> Result<watch::Receiver<BTreeSet<Addr>>, FollowError> {
    watch_with_buffer(RECEIVE_BUFFER).await
}

async fn watch_with_buffer(receive_buffer: usize) -> Result<watch::Receiver<BTreeSet<Addr>>, FollowError> {
    let groups = &[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    follow(Subject { what: "this host's addresses", groups, receive_buffer }, dump).await
}

async fn dump(handle: Handle) -> Result<BTreeSet<Addr>, rtnetlink::Error> {
    let messages = handle.address().get().execute();
    let collect = |mut addresses: BTreeSet<Addr>, message| {
        addresses.extend(address_of(&message));
        std::future::ready(Ok(addresses))
    };
    messages.try_fold(BTreeSet::new(), collect).await
}

/// On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL is ours; elsewhere IPv6 has IFA_ADDRESS only.
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

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use super::*;
    use crate::node::testing::{in_new_netns, ip};

    fn addr(s: &str) -> Addr {
        s.parse::<IpAddr>().unwrap().into()
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
