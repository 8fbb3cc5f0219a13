//! Pods whose sockets are left alone, so that the packet edge serves them: who asks for it, and which cgroups they are.
//!
//! ```text
//! Pods of this node ─> Cluster ─> Follower::want() ─> cgroup tree ─> Found ─> plan_left() ─> OPT_OUT, NODE
//! ```
//! The agent writes what is wanted and reads what was found; one task beside its loop looks at the cgroup tree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};
use tokio::sync::watch;

mod cgroups;
mod rules;

pub use cgroups::{Tree, is_below, look};
pub use rules::{ANNOTATION, RuleError, Rules};

/// How often the tree is looked at without an event, for parents of pods that did not exist.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// How long a burst of events may take to end.
const QUIET: Duration = Duration::from_millis(2);
/// A burst that does not end is looked at nevertheless, and no more often than once in this time.
const BURST: Duration = Duration::from_millis(100);
/// For how long nobody wonders where the cgroup of a pod is: kubelet makes it before anything of the pod runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// The cgroups of pods that are wanted, by the uid that kubelet names them by.
pub type Found = BTreeMap<Arc<str>, Place>;

/// Where a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Id of its cgroup.
    Cgroup(u64),
    /// It has none, which may be because it has only just come.
    NotYet,
    /// It has had none for so long that somebody should look.
    Missing,
}

/// The task that finds cgroups.
#[derive(Debug)]
pub struct Follower {
    wanted: watch::Sender<BTreeSet<Arc<str>>>,
    found: watch::Receiver<Found>,
}

impl Follower {
    /// Starts with nothing wanted, below the root `root` of the cgroup hierarchy.
    ///
    /// # Errors
    ///
    /// The kernel gives no inotify instance.
    pub fn start(root: PathBuf) -> std::io::Result<Self> {
        let (wanted, wanted_here) = watch::channel(BTreeSet::new());
        let (found_here, found) = watch::channel(Found::new());
        let events = Inotify::init()?.into_event_stream(vec![0; 4096])?;
        tokio::spawn(follow(root, events, wanted_here, found_here));
        Ok(Self { wanted, found })
    }

    /// The pods to look for, by uid.
    pub fn want(&self, uids: BTreeSet<Arc<str>>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != uids;
            *wanted = uids;
            changed
        });
    }

    /// Waits for other findings than those of the last call.
    pub async fn changed(&mut self) -> Found {
        if self.found.changed().await.is_err() {
            // The task has panicked, which has been printed; what was found stays in force.
            std::future::pending().await
        }
        self.found.borrow_and_update().clone()
    }
}

async fn follow(
    root: PathBuf,
    mut events: inotify::EventStream<Vec<u8>>,
    mut wanted: watch::Receiver<BTreeSet<Arc<str>>>,
    found: watch::Sender<Found>,
) {
    let mut since: BTreeMap<Arc<str>, Instant> = BTreeMap::new();
    let mut first = true;
    let mut look_at = Instant::now();
    loop {
        let uids = wanted.borrow_and_update().clone();
        since.retain(|uid, _| uids.contains(uid));
        tokio::time::sleep_until(look_at.into()).await;
        let tree = watched(&root, &mut events).await;
        look_at = Instant::now() + BURST;
        let mut places = Found::new();
        for uid in uids {
            let place = match tree.pods.get(&*uid) {
                Some(cgroup) => {
                    since.remove(&uid);
                    Place::Cgroup(*cgroup)
                }
                None if since.entry(Arc::clone(&uid)).or_insert_with(Instant::now).elapsed() < PATIENCE => {
                    Place::NotYet
                }
                None => Place::Missing,
            };
            places.insert(uid, place);
        }
        found.send_if_modified(|before| {
            let changed = std::mem::take(&mut first) || *before != places;
            *before = places;
            changed
        });
        let nobody = wanted.borrow().is_empty();
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            Some(_) = events.next(), if !nobody => {
                let quiet = async { while tokio::time::timeout(QUIET, events.next()).await.is_ok() {} };
                // Whoever keeps making cgroups keeps nobody's from being found.
                let _ = tokio::time::timeout(BURST, quiet).await;
            }
            () = tokio::time::sleep(LOOK_ROUND), if !nobody => {}
        }
    }
}

/// Looks at the tree once the directories that pods appear in are watched, so that none is missed in between.
async fn watched(root: &std::path::Path, events: &mut inotify::EventStream<Vec<u8>>) -> Tree {
    let mut known = BTreeSet::new();
    loop {
        let root = root.to_owned();
        let looking = tokio::task::spawn_blocking(move || look(&root));
        // It is cancelled only when the runtime shuts down.
        let tree = looking.await.unwrap_or_default();
        let fresh: Vec<&PathBuf> = tree.parents.iter().filter(|parent| !known.contains(*parent)).collect();
        if fresh.is_empty() {
            return tree;
        }
        for parent in fresh {
            let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
            // Adding one again changes nothing; one that is gone again is of no use.
            if let Err(error) = events.watches().add(parent, mask) {
                tracing::debug!(path = %parent.display(), %error, "cannot watch cgroups");
            }
        }
        known.extend(tree.parents.iter().cloned());
    }
}
