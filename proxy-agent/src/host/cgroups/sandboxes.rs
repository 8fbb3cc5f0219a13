//! Network namespaces of pods: each pod's own is that of its sandbox. Other namespaces that the pod's processes have
//! made are inside it, and may belong to a cluster with Services of its own.
//!
//! The first process that a runtime starts in a pod (the pause container) keeps the pod's namespaces, and every
//! container begins in the same network namespace. So the pod's network namespace is that of the oldest process in the
//! pod's cgroup. Helpers of the runtime in the same cgroup are skipped: processes in the host's mount namespace
//! (conmon, a container that is not set up yet), and processes in a network namespace without a device (gVisor's gofer,
//! virtiofsd).
//!
//! Pods in the host's network have no network namespace of their own. If a pod's namespace is not certain, the pod is
//! left out. A pod can mislead the agent only about itself, and only if its runtime starts no pause container. The
//! number of its processes and cgroups that are examined is bounded.
//!
//! The result covers the containers that existed at the time of the look. If a sandbox is made anew between two looks,
//! its containers have other cgroups, so nothing is claimed about them.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxy_common::abi::{CgroupId, NetnsCookie};
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::tree::Pod;
use super::way_out;
use crate::host::sys;
use crate::reconcile::plan::Sandbox;

/// Number of pods whose sandboxes are looked for.
pub(crate) const PODS_MAX: usize = 1024;
/// Number of containers of a pod that are listed, the oldest first.
pub(crate) const CONTAINERS_MAX: usize = 16;
/// Depth below a pod's cgroup to which its processes are looked for: containers have cgroups of their own, and make
/// more.
const DEPTH_MAX: u32 = 3;
/// Number of cgroups of a pod that are examined, the oldest of each level first.
const CGROUPS_MAX: usize = 64;
/// Number of entries of a container's cgroup that are read, files among them.
const ENTRIES_MAX: usize = 512;
/// Number of processes of a pod that are examined, the pause container's among the first.
const PROCESSES_MAX: usize = 512;
/// Number of bytes that are read of a file in procfs or a cgroup.
const BYTES_MAX: u64 = 16 * 1024;
/// Devices that any network namespace may have from its beginning.
const OF_EVERY_NAMESPACE: [&str; 10] =
    ["lo", "tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6tnl0", "ip6gre0"];
/// Time for which a new pod with an unknown sandbox is looked at again soon.
const PATIENCE: Duration = Duration::from_secs(10);

/// The known sandboxes of pods.
#[derive(Debug)]
pub(super) struct Sandboxes {
    proc: PathBuf,
    /// Known sandboxes, by the id of the pod's cgroup.
    known: BTreeMap<CgroupId, Origin>,
    /// Times since which sandboxes have been unknown, by the id of the pod's cgroup.
    unknown: BTreeMap<CgroupId, Instant>,
}

impl Default for Sandboxes {
    fn default() -> Self {
        Self { proc: PathBuf::from("/proc"), known: BTreeMap::new(), unknown: BTreeMap::new() }
    }
}

/// Source of the knowledge about a pod's sandbox.
#[derive(Clone, Copy, Debug)]
struct Origin {
    process: Process,
    /// Cookie of the namespace in which the process was, as BPF programs see it. `None` if packets leave it into
    /// another network namespace than the host's: the pod then belongs to a cluster inside something that runs here.
    netns: Option<NetnsCookie>,
}

/// Result of a look at a pod.
enum Finding {
    Known(Origin),
    /// The namespace is known, but its way out is not: perhaps it is still being set up.
    Early(Origin),
    /// The pod is in the host's network.
    None,
    Unknown,
}

/// Process of a pod. An older one has the smaller start time.
#[derive(Clone, Copy, Debug)]
struct Process {
    /// Start time, in ticks since the machine was started.
    start: u64,
    pid: Pid,
}

/// Device and inode, which identify a namespace.
type Inode = (u64, u64);

impl Sandboxes {
    /// Looks at the pods. Returns the known sandboxes by the cgroups of their pods, and whether another look should
    /// follow soon.
    pub(super) fn look<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a Pod>,
    ) -> (BTreeMap<CgroupId, Sandbox>, bool) {
        let before = std::mem::take(&mut self.known);
        let since = std::mem::take(&mut self.unknown);
        let host = Host::look(&self.proc);
        let mut found = BTreeMap::new();
        for pod in pods.take(PODS_MAX) {
            let still = before.get(&pod.id).copied().filter(|origin| self.is_there(origin));
            let mut finding = match (still, &host) {
                (Some(origin), _) => Finding::Known(origin),
                (None, Some(host)) => self.find(&pod.path, host),
                (None, None) => Finding::None,
            };
            let first = since.get(&pod.id).copied().unwrap_or_else(Instant::now);
            if let Finding::Early(origin) = finding
                && first.elapsed() >= PATIENCE
            {
                finding = Finding::Known(origin);
            }
            match finding {
                Finding::Known(origin) => {
                    self.known.insert(pod.id, origin);
                    let containers = below(&pod.path, 0).into_iter().take(CONTAINERS_MAX).map(|(id, _)| id);
                    found.insert(pod.id, Sandbox { netns: origin.netns, containers: containers.collect() });
                }
                Finding::None => {}
                Finding::Unknown | Finding::Early(_) => {
                    self.unknown.insert(pod.id, first);
                }
            }
        }
        let soon = self.unknown.values().any(|since| since.elapsed() < PATIENCE);
        (found, soon)
    }

    /// Makes pods with unknown sandboxes be looked at again soon, because cgroups have come or gone.
    pub(super) fn be_patient(&mut self) {
        self.unknown.values_mut().for_each(|since| *since = Instant::now());
    }

    /// Returns whether the process still runs. If the process is in another namespace by now, it has moved there
    /// itself.
    fn is_there(&self, origin: &Origin) -> bool {
        self.start(origin.process.pid) == Some(origin.process.start)
    }

    /// Returns the sandbox of the pod with this cgroup: that of the oldest process that is no helper.
    fn find(&self, pod: &Path, host: &Host) -> Finding {
        self.oldest(pod, host).unwrap_or(Finding::Unknown)
    }

    fn oldest(&self, pod: &Path, host: &Host) -> Option<Finding> {
        let mut processes: Vec<Process> = pids(pod)
            .into_iter()
            .filter_map(|pid| self.start(pid).map(|start| Process { start, pid }))
            .collect();
        processes.sort_unstable_by_key(|process| (process.start, process.pid.as_raw_pid()));
        let process = processes.into_iter().find(|process| {
            self.namespace(process.pid, "mnt").is_some_and(|mounts| mounts != host.mounts)
                && self.has_device(process.pid)
        })?;
        let namespace = File::open(self.path(process.pid, "ns/net")).ok()?;
        let netns = inode(&namespace.metadata().ok()?);
        // The namespace is this process's only if the pid has not been reused.
        if self.start(process.pid) != Some(process.start) {
            return None;
        }
        if netns == host.network {
            return Some(Finding::None);
        }
        let (elsewhere, cookie) = way_out(&namespace, &host.file)?;
        let netns = (elsewhere != Some(true)).then_some(cookie);
        let origin = Origin { process, netns };
        Some(if elsewhere.is_some() { Finding::Known(origin) } else { Finding::Early(origin) })
    }

    fn path(&self, pid: Pid, file: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(file)
    }

    /// Returns the start time of a process: field 22 of its `stat` (proc(5)). Field 2, the name, may contain any
    /// characters.
    fn start(&self, pid: Pid) -> Option<u64> {
        let stat = read(&self.path(pid, "stat"))?;
        let (_, after_name) = stat.rsplit_once(')')?;
        after_name.split_ascii_whitespace().nth(19)?.parse().ok()
    }

    fn namespace(&self, pid: Pid, kind: &str) -> Option<Inode> {
        fs::metadata(self.path(pid, "ns").join(kind)).ok().map(|namespace| inode(&namespace))
    }

    /// Returns whether the network namespace of a process leads anywhere: whether it has a device other than loopback
    /// and the tunnels that every namespace may have from its beginning (`net.core.fb_tunnels_only_for_init_net`).
    fn has_device(&self, pid: Pid) -> bool {
        let devices = read(&self.path(pid, "net/dev")).unwrap_or_default();
        let mut names = devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
        names.any(|name| !OF_EVERY_NAMESPACE.contains(&name))
    }
}

/// Namespaces of the host.
struct Host {
    file: File,
    network: Inode,
    mounts: Inode,
}

impl Host {
    fn look(proc: &Path) -> Option<Self> {
        // If the kernel reports no cookies, sandboxes are not looked for.
        sys::netns_cookie()?;
        // The agent runs in the host's network namespace. The host's mount namespace is that of process 1. If that
        // cannot be read, it is the agent's own, because the agent is in no container then.
        let [first, own] = ["1/ns/mnt", "self/ns/mnt"].map(|path| fs::metadata(proc.join(path)).ok());
        let file = File::open(proc.join("thread-self/ns/net")).ok()?;
        Some(Self { network: inode(&file.metadata().ok()?), mounts: inode(&first.or(own)?), file })
    }
}

fn inode(of: &fs::Metadata) -> Inode {
    (of.dev(), of.ino())
}

/// Returns the processes in a pod's cgroup, level by level, from the oldest cgroups of each level first.
fn pids(pod: &Path) -> Vec<Pid> {
    let mut pids = Vec::new();
    let mut levels = VecDeque::from([(pod.to_owned(), 0)]);
    let mut looked = 0;
    while let Some((directory, depth)) = levels.pop_front() {
        let members = read(&directory.join("cgroup.procs")).unwrap_or_default();
        // A process of another pid namespace is listed as 0.
        pids.extend(members.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)));
        looked += 1;
        if pids.len() >= PROCESSES_MAX || looked >= CGROUPS_MAX {
            break;
        }
        if depth < DEPTH_MAX {
            levels.extend(below(&directory, depth).into_iter().map(|(_, below)| (below, depth + 1)));
        }
    }
    pids.truncate(PROCESSES_MAX);
    pids
}

/// Returns the cgroups below `directory` with their ids, the oldest first: ids count up.
fn below(directory: &Path, depth: u32) -> Vec<(CgroupId, PathBuf)> {
    // The runtime makes the cgroups directly below a pod's, but a container's processes make those below the
    // container's.
    let most = if depth == 0 { usize::MAX } else { ENTRIES_MAX };
    let entries = fs::read_dir(directory).into_iter().flatten().take(most).flatten();
    let mut directories: Vec<(CgroupId, PathBuf)> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| (CgroupId(entry.ino()), entry.path()))
        .collect();
    directories.sort_unstable();
    directories.truncate(CGROUPS_MAX);
    directories
}

/// Returns the beginning of a file.
fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Returns whether the way out of a network namespace leads into another one than `host` (if that is known), and the
/// namespace's cookie. Returns `None` before kernel 5.14.
fn way_out(namespace: &File, host: &File) -> Option<(Option<bool>, NetnsCookie)> {
    within(namespace, || {
        let elsewhere = way_out::leads_elsewhere(host).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot tell where a pod's packets go");
            None
        });
        Some((elsewhere, sys::netns_cookie()?))
    })
}

/// Runs `look` in a network namespace, on a thread that ends afterwards.
fn within<T: Send>(namespace: &File, look: impl FnOnce() -> Option<T> + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("sandboxes".to_owned()).spawn_scoped(scope, || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).ok()?;
            look()
        });
        thread.ok()?.join().ok()?
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A directory that looks like a pod's cgroup, and processes that seem to be in it.
    struct Fake {
        root: tempfile::TempDir,
        children: Vec<Child>,
    }

    impl Fake {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap(), children: Vec::new() }
        }

        fn pod(&self) -> Pod {
            let path = self.root.path().to_owned();
            Pod { id: CgroupId(fs::metadata(&path).unwrap().ino()), path }
        }

        /// Runs a process in new namespaces, with or without a device in its network. Returns when the process is
        /// ready.
        fn run(&mut self, cgroup: &str, namespaces: &[&str], device: bool) -> Pid {
            let script = if device {
                "ip link add d0 type veth peer name d1 && ip link set d0 up && ip address add 10.0.0.1/24 dev d0 && \
                 ip route add default via 10.0.0.2 && echo && read x"
            } else {
                "echo && read x"
            };
            let mut child = Command::new("unshare")
                .args(namespaces)
                .args(["sh", "-c", script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0];
            child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
            let directory = self.root.path().join(cgroup);
            fs::create_dir_all(&directory).unwrap();
            let pids = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            fs::write(directory.join("cgroup.procs"), format!("{pids}{}\n", child.id())).unwrap();
            let pid = Pid::from_child(&child);
            self.children.push(child);
            // Two processes that start in the same tick have the same age.
            std::thread::sleep(Duration::from_millis(30));
            pid
        }

        fn kill(&mut self, pid: Pid) {
            let child = self.children.iter_mut().find(|child| Pid::from_child(child) == pid).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    const CONTAINER: &[&str] = &["--mount", "--net"];

    fn cookie_of(pid: Pid) -> NetnsCookie {
        cookie(&File::open(format!("/proc/{pid}/ns/net")).unwrap())
    }

    fn cookie(namespace: &File) -> NetnsCookie {
        within(namespace, sys::netns_cookie).expect("a kernel of 5.14")
    }

    fn known(sandboxes: &mut Sandboxes, pod: &Pod) -> Option<NetnsCookie> {
        let (found, soon) = sandboxes.look([pod].into_iter());
        assert!(found.is_empty() || !soon);
        assert!(found.keys().all(|cgroup| *cgroup == pod.id));
        found.get(&pod.id).and_then(|sandbox| sandbox.netns)
    }

    #[test]
    fn the_oldest_process_of_a_container_tells() {
        let (mut fake, mut sandboxes) = (Fake::new(), Sandboxes::default());
        let pod = fake.pod();
        assert_eq!(known(&mut sandboxes, &pod), None);
        // Processes that are skipped: conmon, a container that is being set up, gVisor's gofer.
        fake.run("conmon", &["--net"], true);
        fake.run("b", &["--net"], false);
        fake.run("b", CONTAINER, false);
        assert_eq!(known(&mut sandboxes, &pod), None);

        let pause = fake.run("b/container", CONTAINER, true);
        let own = cookie_of(pause);
        assert_eq!(known(&mut sandboxes, &pod), Some(own));
        // A container with a network of its own, in a cgroup that comes first.
        let inner = fake.run("a", CONTAINER, true);
        for sandboxes in [&mut sandboxes, &mut Sandboxes::default()] {
            assert_eq!(known(sandboxes, &pod), Some(own));
        }
        assert_ne!(cookie_of(inner), own);
        fake.kill(pause);
        assert_eq!(known(&mut sandboxes, &pod), Some(cookie_of(inner)), "without a pause container");
        fake.kill(inner);
        assert_eq!(known(&mut sandboxes, &pod), None);
        assert_eq!(sandboxes.look([].into_iter()), (BTreeMap::new(), false));
        assert!(sandboxes.known.is_empty() && sandboxes.unknown.is_empty());
    }

    /// Nothing is known of a pod in the host's network, even if it has networks inside.
    #[test]
    fn a_pod_in_the_hosts_network_has_no_sandbox() {
        let (mut fake, mut sandboxes) = (Fake::new(), Sandboxes::default());
        fake.run("pause", &["--mount"], false);
        fake.run("dind", CONTAINER, true);
        let host = File::open("/proc/thread-self/ns/net").unwrap();
        let devices = read(Path::new("/proc/self/net/dev")).unwrap();
        assert!(devices.lines().count() > 3, "the host has no device:\n{devices}");
        assert_eq!(known(&mut sandboxes, &fake.pod()), None);
        assert_eq!(Some(cookie(&host)), sys::netns_cookie());
    }

    /// However many processes and cgroups a container makes, the pause container's are seen, and no more than a bounded
    /// number is examined.
    #[test]
    fn a_crowd_hides_nobody() {
        let (mut fake, mut sandboxes) = (Fake::new(), Sandboxes::default());
        // Inode numbers count up in cgroups, but not in every file system.
        let both = ["pause", "crowd"].map(|name| {
            let path = fake.root.path().join(name);
            fs::create_dir(&path).unwrap();
            (fs::metadata(&path).unwrap().ino(), path)
        });
        if both[0] > both[1] {
            for (from, to) in [(0, "swapped"), (1, "pause")] {
                fs::rename(&both[from].1, fake.root.path().join(to)).unwrap();
            }
            fs::rename(fake.root.path().join("swapped"), &both[1].1).unwrap();
        }
        let pause = fake.run("pause", CONTAINER, true);
        fake.run("crowd", CONTAINER, true);
        let own: String = (0..2 * PROCESSES_MAX).map(|_| format!("{}\n", std::process::id())).collect();
        fs::write(fake.root.path().join("crowd/cgroup.procs"), own).unwrap();
        for number in 0..ENTRIES_MAX + CGROUPS_MAX {
            fs::create_dir(fake.root.path().join(format!("crowd/{number}"))).unwrap();
        }
        assert_eq!(known(&mut sandboxes, &fake.pod()), Some(cookie_of(pause)));
        assert_eq!(pids(fake.root.path()).len(), PROCESSES_MAX);
        assert_eq!(below(&fake.root.path().join("crowd"), 1).len(), CGROUPS_MAX);
    }
}
