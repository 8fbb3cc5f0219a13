//! Pods and other cgroups whose sockets are left alone, so that the packet edge serves them: who asks for it, and which cgroups they
//! are. And the sandboxes of all pods: what is in a network inside one is left alone, too.
//!
//! ```text
//! Pods of this node ─> Cluster ─> Follower::want() ─┐
//!                                     cgroup tree ──┴─> Found ─> plan_left() ─> OPT_OUT, SANDBOXES, NODE
//! ```
//! The agent writes what is wanted and reads what was found; one task beside its loop looks at the cgroup tree.

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

use sandboxes::Sandboxes;
pub use sandboxes::{CONTAINERS_MAX, PODS_MAX};
pub use tree::{Tree, is_below, look};

use crate::reconcile::plan::Sandbox;

/// How often the tree is looked at without an event, for parents of pods that did not exist.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// The same while the sandbox of a pod that has come is not known: nothing tells when it has been set up.
const LOOK_SOON: Duration = Duration::from_millis(250);
/// How long a burst of events may take to end.
const QUIET: Duration = Duration::from_millis(2);
/// A burst that does not end is looked at nevertheless, and no more often than once in this time.
const BURST: Duration = Duration::from_millis(100);
/// For how long nobody wonders where the cgroup of a pod is: kubelet makes it before anything of the pod runs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a look at the tree has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The pods that are wanted, by the uid that kubelet names their cgroups by.
    pub pods: BTreeMap<Arc<str>, Place>,
    /// Ids of the cgroups that opt out by their paths, as far as they are there.
    pub cgroups: BTreeMap<String, u64>,
    /// Pods whose network namespace is known, by the ids of their cgroups.
    pub sandboxes: BTreeMap<u64, Sandbox>,
}

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
    /// Starts with nothing wanted, below the root `root` of the cgroup hierarchy. `cgroups` are paths there.
    pub fn start(root: PathBuf, cgroups: BTreeSet<String>) -> Self {
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
                // Whoever keeps making cgroups keeps nobody's from being found.
                let _ = tokio::time::timeout(BURST, quiet).await;
                looker.sandboxes.be_patient();
            }
            () = tokio::time::sleep(if soon { LOOK_SOON } else { LOOK_ROUND }) => {}
        }
    }
}

/// What looks at the tree.
struct Looker {
    root: PathBuf,
    /// Paths of cgroups that opt out.
    cgroups: BTreeSet<String>,
    /// Of directories that cgroups appear in; none where the kernel gives no inotify instance.
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

    /// Looks at the tree once the directories that pods and containers appear in are watched, so that none is missed in between.
    async fn watched(&mut self) -> Tree {
        let mut known = BTreeSet::new();
        loop {
            let root = self.root.clone();
            let looking = tokio::task::spawn_blocking(move || look(&root));
            // It is cancelled only when the runtime shuts down.
            let tree = looking.await.unwrap_or_default();
            let of_cgroups = self.cgroups.iter().filter_map(|path| parent(&self.root, path));
            let pods = tree.pods.values().map(|pod| pod.path.clone());
            let all: BTreeSet<PathBuf> = tree.parents.iter().cloned().chain(pods).chain(of_cgroups).collect();
            let fresh: Vec<PathBuf> = all.difference(&known).cloned().collect();
            let (Some(events), false) = (&mut self.events, fresh.is_empty()) else { return tree };
            for directory in fresh {
                let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
                // Adding one again changes nothing; one that is gone again is of no use.
                if let Err(error) = events.watches().add(&directory, mask) {
                    tracing::debug!(path = %directory.display(), %error, "cannot watch cgroups");
                }
            }
            known.extend(all);
        }
    }

    /// Looks at the sandboxes of the pods in `tree`; says also whether they should be looked at again soon.
    async fn sandboxes(&mut self, tree: &Tree) -> (BTreeMap<u64, Sandbox>, bool) {
        let pods: Vec<_> = tree.pods.values().cloned().collect();
        let mut sandboxes = std::mem::take(&mut self.sandboxes);
        let looking = tokio::task::spawn_blocking(move || {
            let found = sandboxes.look(pods.iter());
            (sandboxes, found)
        });
        // As above.
        let Ok((sandboxes, found)) = looking.await else { return (BTreeMap::new(), false) };
        self.sandboxes = sandboxes;
        found
    }

    /// Ids of the cgroups that opt out by their paths.
    fn cgroups(&self) -> BTreeMap<String, u64> {
        let id = |path: &str| std::fs::metadata(self.root.join(path)).ok().filter(std::fs::Metadata::is_dir);
        let found = self.cgroups.iter().filter_map(|path| Some((path.clone(), id(path)?.ino())));
        found.collect()
    }
}

/// The directory in which a cgroup appears, or in which one above it does.
fn parent(root: &Path, path: &str) -> Option<PathBuf> {
    let path = root.join(path);
    let mut above = path.ancestors().skip(1).take_while(|above| above.starts_with(root));
    above.find(|above| above.is_dir()).map(Path::to_owned)
}
