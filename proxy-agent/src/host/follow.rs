//! Follows a part of the kernel's state by rtnetlink: a value read by dumps, at once and after each change.
//!
//! A notification only says *that* something changed; the value is read by a new dump. So a lost notification (ENOBUFS
//! when the receive buffer overflows) costs nothing: the error is a notification as well. Dumps use a socket of their
//! own, which no flood of notifications can disturb.

use std::io;
use std::time::{Duration, Instant};

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt as _, StreamExt as _};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{AsyncSocket as _, SocketAddr};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Least ratio of the time between two dumps to the time that a dump takes.
const REST: u32 = 4;
/// Time after which a dump is given up: a dump takes milliseconds, and one that takes this long will never end.
const DUMP_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a broken connection to the kernel is made again.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes of notifications that may wait. The kernel caps the number at `net.core.rmem_max`.
pub(crate) const RECEIVE_BUFFER: usize = 256 * 1024;

/// Reason why a value cannot be followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    /// No rtnetlink socket could be opened.
    #[error("cannot open an rtnetlink socket to read {what}: {source}")]
    Open {
        /// Name of the value.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel refused the dump.
    #[error("cannot list {what} over rtnetlink: {source}")]
    Dump {
        /// Name of the value.
        what: &'static str,
        /// The kernel's error.
        source: rtnetlink::Error,
    },
    /// The dump did not end.
    #[error("listing {0} over rtnetlink did not end within {DUMP_TIMEOUT:?}")]
    Timeout(&'static str),
    /// The connection for notifications ended.
    #[error("the rtnetlink connection that reports changes of {0} has ended")]
    Ended(&'static str),
}

/// A value to follow, and how to follow it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    /// Name of the value in messages: "this host's addresses".
    pub(crate) what: &'static str,
    /// Groups whose notifications are changes of the value.
    pub(crate) groups: &'static [MulticastGroup],
    /// Delay between a notification and the dump: one dump then covers a whole burst. Zero if a change must be read at
    /// once.
    pub(crate) settle: Duration,
    /// Bytes of notifications that may wait.
    pub(crate) receive_buffer: usize,
}

/// Follows the value that `dump` reads in the calling thread's network namespace, at once and after each change.
/// Following ends when every receiver is dropped. A broken connection is made again, without a limit, with a log line.
///
/// # Errors
///
/// Returns an error if the value cannot be read for the first time.
pub(crate) async fn follow<T, D, F>(subject: Subject, dump: D) -> Result<watch::Receiver<T>, FollowError>
where
    T: PartialEq + Send + Sync + 'static,
    D: Fn(Handle) -> F + Send + Sync + 'static,
    F: Future<Output = Result<T, rtnetlink::Error>> + Send,
{
    let mut feed = Feed::open(subject)?;
    let (sender, receiver) = watch::channel(feed.dump(&dump).await?);
    tokio::spawn(async move {
        let ended = sender.closed();
        tokio::select! {
            () = ended => {}
            () = follow_for_ever(feed, dump, &sender) => {}
        }
    });
    Ok(receiver)
}

async fn follow_for_ever<T, D, F>(mut feed: Feed, dump: D, sender: &watch::Sender<T>)
where
    T: PartialEq,
    D: Fn(Handle) -> F,
    F: Future<Output = Result<T, rtnetlink::Error>>,
{
    let what = feed.subject.what;
    loop {
        let Err(error) = feed.follow(&dump, sender).await;
        tracing::warn!(%error, retry_in = ?RETRY, "lost track of {what}");
        feed = loop {
            tokio::time::sleep(RETRY).await;
            match reopen(feed.subject, &dump, sender).await {
                Ok(feed) => break feed,
                Err(error) => tracing::warn!(%error, retry_in = ?RETRY, "cannot follow {what}"),
            }
        };
        tracing::info!("following {what} again");
    }
}

async fn reopen<T, D, F>(subject: Subject, dump: &D, sender: &watch::Sender<T>) -> Result<Feed, FollowError>
where
    T: PartialEq,
    D: Fn(Handle) -> F,
    F: Future<Output = Result<T, rtnetlink::Error>>,
{
    let mut feed = Feed::open(subject)?;
    deliver(subject.what, feed.dump(dump).await?, sender);
    Ok(feed)
}

/// Two sockets: one receives notifications of changes, the other one reads the whole value.
struct Feed {
    subject: Subject,
    changes: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    dumps: Handle,
    /// Time before which the next dump does not begin, because the last one may have taken long.
    rested_at: Instant,
    /// Drives both sockets; aborted on drop.
    _connections: JoinSet<()>,
}

impl Feed {
    fn open(subject: Subject) -> Result<Self, FollowError> {
        let failed = |source| FollowError::Open { what: subject.what, source };
        let (mut notifying, _, changes) = new_multicast_connection(subject.groups).map_err(failed)?;
        notifying.socket_mut().socket_mut().set_rx_buf_sz(subject.receive_buffer).map_err(failed)?;
        let (dumping, dumps, _) = new_connection().map_err(failed)?;
        let mut connections = JoinSet::new();
        connections.spawn(notifying);
        connections.spawn(dumping);
        Ok(Self { subject, changes, dumps, rested_at: Instant::now(), _connections: connections })
    }

    async fn dump<T, D, F>(&mut self, dump: &D) -> Result<T, FollowError>
    where
        D: Fn(Handle) -> F,
        F: Future<Output = Result<T, rtnetlink::Error>>,
    {
        let what = self.subject.what;
        let start = Instant::now();
        let value = match tokio::time::timeout(DUMP_TIMEOUT, dump(self.dumps.clone())).await {
            Ok(value) => value.map_err(|source| FollowError::Dump { what, source })?,
            Err(_elapsed) => return Err(FollowError::Timeout(what)),
        };
        self.rested_at = Instant::now() + start.elapsed() * REST;
        Ok(value)
    }

    /// Delivers the whole value after each change, until the connection breaks.
    async fn follow<T, D, F>(
        &mut self,
        dump: &D,
        sender: &watch::Sender<T>,
    ) -> Result<std::convert::Infallible, FollowError>
    where
        T: PartialEq,
        D: Fn(Handle) -> F,
        F: Future<Output = Result<T, rtnetlink::Error>>,
    {
        while self.changes.next().await.is_some() {
            let now = Instant::now();
            let due = self.rested_at.max(now + self.subject.settle);
            if due > now {
                tokio::time::sleep_until(due.into()).await;
            }
            // Notifications that wait now are about changes before the dump that follows.
            while let Some(Some(_)) = self.changes.next().now_or_never() {}
            deliver(self.subject.what, self.dump(dump).await?, sender);
        }
        Err(FollowError::Ended(self.subject.what))
    }
}

fn deliver<T: PartialEq>(what: &'static str, value: T, sender: &watch::Sender<T>) {
    sender.send_if_modified(|known| {
        let changed = *known != value;
        if changed {
            tracing::debug!("{what} changed");
            *known = value;
        }
        changed
    });
}
