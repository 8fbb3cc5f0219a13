//! Cgroups of pods and others whose sockets are left alone, so that the packet edge serves them. Also the sandboxes of
//! all pods: sockets in a network namespace inside a sandbox are left alone, too.
//!
//! ```text
//! Pods of this node ─> Cluster ─> Follower::want() ─┐
//!                                     cgroup tree ──┴─> Found ─> plan_left() ─> OPT_OUT, SANDBOXES, NODE
//! ```
//! The agent writes the wanted pods and reads the findings; one task beside its loop looks at the cgroup tree.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};
use tokio::sync::watch;

mod sandboxes;
mod tree;
mod way_out;

use proxy_common::abi::CgroupId;
use sandboxes::Sandboxes;
pub(crate) use sandboxes::{CONTAINERS_MAX, PODS_MAX};
pub(crate) use tree::{Tree, is_below, look};

use crate::reconcile::plan::Sandbox;

/// Interval at which the tree is looked at without an event, to find parents of pods that did not exist before.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// Interval while the sandbox of a new pod is not known: no event reports that it has been set up.
const LOOK_SOON: Duration = Duration::from_millis(250);
/// Time without events after which a burst of events has ended.
const QUIET: Duration = Duration::from_millis(2);
/// Time after which a burst that does not end is ignored, and least time between two looks.
const BURST: Duration = Duration::from_millis(100);
/// Time for which a missing pod cgroup is not reported: kubelet makes the cgroup before anything of the pod runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Result of a look at the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Wanted pods, by the uid that kubelet names their cgroups by.
    pub(crate) pods: BTreeMap<Arc<str>, Place>,
    /// Ids of the existing cgroups that opt out by their paths.
    pub(crate) cgroups: BTreeMap<String, CgroupId>,
    /// Pods whose network namespace is known, by the ids of their cgroups.
    pub(crate) sandboxes: BTreeMap<CgroupId, Sandbox>,
}

/// Place of a pod's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The pod has a cgroup with this id.
    Cgroup(CgroupId),
    /// The pod has no cgroup, perhaps because it has only just come.
    NotYet,
    /// The pod has had no cgroup for so long that somebody should check.
    Missing,
}

/// Handle of the task that finds cgroups.
#[derive(Debug)]
pub(crate) struct Follower {
    wanted: watch::Sender<BTreeSet<Arc<str>>>,
    found: watch::Receiver<Found>,
}

impl Follower {
    /// Starts the task with nothing wanted, below the root `root` of the cgroup hierarchy. `cgroups` are paths below
    /// it.
    pub(crate) fn start(root: PathBuf, cgroups: BTreeSet<String>) -> Self {
        let (wanted, wanted_here) = watch::channel(BTreeSet::new());
        let (found_here, found) = watch::channel(Found::default());
        let events = Inotify::init().and_then(|events| events.into_event_stream(vec![0; 4096]));
        if let Err(error) = &events {
            tracing::warn!(
                %error,
                "cgroups of pods are looked at every {LOOK_ROUND:?} only; if too many files are watched, raise \
                 fs.inotify.max_user_instances"
            );
        }
        let looker = Looker { root, cgroups, events: events.ok(), sandboxes: Sandboxes::default() };
        tokio::spawn(follow(looker, wanted_here, found_here));
        Self { wanted, found }
    }

    /// Sets the pods to look for, by uid.
    pub(crate) fn want(&self, uids: BTreeSet<Arc<str>>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != uids;
            *wanted = uids;
            changed
        });
    }

    /// Waits until the findings differ from those of the last call.
    pub(crate) async fn changed(&mut self) -> Found {
        if self.found.changed().await.is_err() {
            // The task has panicked, and the panic has been printed. The last findings stay in force.
            std::future::pending().await
        }
        self.found.borrow_and_update().clone()
    }
}

async fn follow(
    mut looker: Looker,
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
        let tree = looker.watched().await;
        let (sandboxes, soon) = looker.sandboxes(&tree).await;
        look_at = Instant::now() + BURST;
        let mut now = Found { cgroups: looker.cgroups(), sandboxes, ..Found::default() };
        for uid in uids {
            let place = match tree.pods.get(&*uid) {
                Some(pod) => {
                    since.remove(&uid);
                    Place::Cgroup(pod.id)
                }
                None if since.entry(Arc::clone(&uid)).or_insert_with(Instant::now).elapsed() < PATIENCE => {
                    Place::NotYet
                }
                None => Place::Missing,
            };
            now.pods.insert(uid, place);
        }
        found.send_if_modified(|before| {
            let changed = std::mem::take(&mut first) || *before != now;
            *before = now;
            changed
        });
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = looker.event() => {
                let quiet = async { while tokio::time::timeout(QUIET, looker.event()).await.is_ok() {} };
                // A process that makes cgroups without end does not delay the next look any longer than this.
                let _ = tokio::time::timeout(BURST, quiet).await;
                looker.sandboxes.be_patient();
            }
            () = tokio::time::sleep(if soon { LOOK_SOON } else { LOOK_ROUND }) => {}
        }
    }
}

/// The state of the task that looks at the tree.
struct Looker {
    root: PathBuf,
    /// Paths of cgroups that opt out.
    cgroups: BTreeSet<String>,
    /// Events of directories that cgroups appear in; none if the kernel gives no inotify instance.
    events: Option<inotify::EventStream<Vec<u8>>>,
    sandboxes: Sandboxes,
}

impl Looker {
    /// Waits for an event.
    async fn event(&mut self) {
        match &mut self.events {
            Some(events) => {
                if events.next().await.is_none() {
                    std::future::pending().await
                }
            }
            None => std::future::pending().await,
        }
    }

    /// Looks at the tree after watching the directories that pods and containers appear in, so that none is missed in
    /// between.
    async fn watched(&mut self) -> Tree {
        let mut known = BTreeSet::new();
        loop {
            let root = self.root.clone();
            let looking = tokio::task::spawn_blocking(move || look(&root));
            // The blocking task is cancelled only when the runtime shuts down.
            let tree = looking.await.unwrap_or_default();
            let of_cgroups = self.cgroups.iter().filter_map(|path| parent(&self.root, path));
            let pods = tree.pods.values().map(|pod| pod.path.clone());
            let all: BTreeSet<PathBuf> = tree.parents.iter().cloned().chain(pods).chain(of_cgroups).collect();
            let fresh: Vec<PathBuf> = all.difference(&known).cloned().collect();
            let (Some(events), false) = (&mut self.events, fresh.is_empty()) else { return tree };
            for directory in fresh {
                let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
                // Adding a watch again changes nothing. A directory that is gone again does not matter.
                if let Err(error) = events.watches().add(&directory, mask) {
                    tracing::debug!(path = %directory.display(), %error, "cannot watch cgroups");
                }
            }
            known.extend(all);
        }
    }

    /// Looks at the sandboxes of the pods in `tree`. Also returns whether another look should follow soon.
    async fn sandboxes(&mut self, tree: &Tree) -> (BTreeMap<CgroupId, Sandbox>, bool) {
        let pods: Vec<_> = tree.pods.values().cloned().collect();
        let mut sandboxes = std::mem::take(&mut self.sandboxes);
        let looking = tokio::task::spawn_blocking(move || {
            let found = sandboxes.look(pods.iter());
            (sandboxes, found)
        });
        // The blocking task is cancelled only when the runtime shuts down.
        let Ok((sandboxes, found)) = looking.await else { return (BTreeMap::new(), false) };
        self.sandboxes = sandboxes;
        found
    }

    /// Returns the ids of the cgroups that opt out by their paths.
    fn cgroups(&self) -> BTreeMap<String, CgroupId> {
        let found = self.cgroups.iter().filter_map(|path| {
            let directory = std::fs::metadata(self.root.join(path)).ok().filter(std::fs::Metadata::is_dir)?;
            Some((path.clone(), CgroupId(directory.ino())))
        });
        found.collect()
    }
}

/// Returns the directory in which a cgroup, or its topmost missing ancestor, appears.
fn parent(root: &Path, path: &str) -> Option<PathBuf> {
    let path = root.join(path);
    let mut above = path.ancestors().skip(1).take_while(|above| above.starts_with(root));
    above.find(|above| above.is_dir()).map(Path::to_owned)
}
