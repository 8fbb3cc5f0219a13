//! Everything that a lab makes besides processes: a cgroup subtree, pins, and files of agents. This module decides
//! their paths and names, and removes them, also those of labs whose process was killed before it could clean up.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use proxy_agent::host::Host;
use rustix::fs::{FlockOperation, flock, statfs};
use rustix::process::{Pid, Signal, kill_process};

/// Conventional mount point of bpffs.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC`.
const BPFFS_MAGIC: u64 = 0xcafe_4a11;
/// Conventional directory of files of running programs, which last until the machine is switched off.
const RUN: &str = "/run";
const PREFIX: &str = "vipr-lab";

/// The directories of one lab. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Residue {
    /// Directory in the cgroup v2 hierarchy; exists.
    pub(super) cgroup: PathBuf,
    /// Directory on bpffs below which nodes get their pin directories; exists.
    pub(super) pins: PathBuf,
    /// Directory below which nodes get their agents' `--run-dir`; exists.
    pub(super) run: PathBuf,
}

impl Residue {
    /// Removes the leftovers of dead processes, then makes the directories of a new lab.
    ///
    /// # Errors
    /// If cgroup v2 or bpffs is missing and cannot be mounted.
    pub(super) fn create() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        // Found in the way in which the agent finds it: it may be mounted more than once.
        let cgroup_root = Host::look(None)?.cgroup;
        mount_bpffs()?;
        let own = Owner::this_process()?;
        sweep(&cgroup_root, &own, remove_cgroup)?;
        sweep(Path::new(BPFFS), &own, remove_tree)?;
        sweep(Path::new(RUN), &own, remove_tree)?;

        let name = own.name(COUNTER.fetch_add(1, Ordering::Relaxed));
        let [pins, run] = [BPFFS, RUN].map(|root| Path::new(root).join(&name));
        let residue = Self { cgroup: cgroup_root.join(&name), pins, run };
        for dir in [&residue.cgroup, &residue.pins, &residue.run] {
            fs::create_dir(dir)
                .with_context(|| format!("cannot create {}: the lab needs root", dir.display()))?;
        }
        Ok(residue)
    }
}

impl Drop for Residue {
    /// Kills the processes in the cgroups, then removes everything.
    fn drop(&mut self) {
        for result in [remove_cgroup(&self.cgroup), remove_tree(&self.pins), remove_tree(&self.run)] {
            if let Err(error) = result {
                eprintln!("lab: {error:#}");
            }
        }
    }
}

/// The process that a directory name belongs to. The start time distinguishes it from a later process with the same id,
/// the pid namespace from a process of another container with the same id.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    pid_namespace: u64,
    pid: u32,
    start: u64,
}

impl Owner {
    fn this_process() -> Result<Self> {
        let pid = std::process::id();
        let namespace = fs::metadata("/proc/self/ns/pid").context("/proc/self/ns/pid")?;
        let start =
            start_time(pid).context("cannot read the start time of this process from /proc/self/stat")?;
        Ok(Self { pid_namespace: namespace.ino(), pid, start })
    }

    fn name(&self, counter: u32) -> String {
        // bpffs refuses names with dots.
        format!("{PREFIX}-{}-{}-{}-{counter}", self.pid_namespace, self.pid, self.start)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.strip_prefix('-')?.split('-');
        let pid_namespace = parts.next()?.parse().ok()?;
        let pid = parts.next()?.parse().ok()?;
        let start = parts.next()?.parse().ok()?;
        Some(Self { pid_namespace, pid, start })
    }

    /// Returns whether the owner is known to be dead, for a process of namespace `pid_namespace`.
    fn is_dead(&self, pid_namespace: u64) -> bool {
        self.pid_namespace == pid_namespace && start_time(self.pid) != Some(self.start)
    }
}

/// Returns the start time of a process in clock ticks since boot; `None` if the process does not exist.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may hold spaces and parentheses; the start is field 22.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

fn sweep(root: &Path, own: &Owner, remove: fn(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(root).with_context(|| format!("cannot list {}", root.display()))?.flatten() {
        let owner = entry.file_name().to_str().and_then(Owner::parse);
        if owner.is_some_and(|owner| owner.is_dead(own.pid_namespace)) {
            // Another lab may be removing the same leftovers; a leftover that cannot be removed must not stop this lab.
            if let Err(error) = remove(&entry.path()) {
                eprintln!("lab: leftover {} stays: {error:#}", entry.path().display());
            }
        }
    }
    Ok(())
}

fn mount_bpffs() -> Result<()> {
    if is_mounted() {
        return Ok(());
    }
    let lock = File::open(BPFFS)
        .with_context(|| format!("no {BPFFS}: this kernel has no BPF, or /sys is hidden"))?;
    // A second mount would hide the contents of the first one.
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {BPFFS}"))?;
    if !is_mounted() {
        rustix::mount::mount("bpf", BPFFS, "bpf", rustix::mount::MountFlags::empty(), None)
            .with_context(|| format!("cannot mount bpffs; as root: `mount -t bpf bpf {BPFFS}`"))?;
    }
    Ok(())
}

fn is_mounted() -> bool {
    statfs(BPFFS).is_ok_and(|fs| fs.f_type as u64 == BPFFS_MAGIC)
}

/// Kills every process below `dir`, waits for their end and removes the cgroups.
pub(super) fn remove_cgroup(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    kill_cgroup(dir)?;
    for child in subdirectories(dir) {
        remove_cgroup(&child)?;
    }
    missing_is_fine(fs::remove_dir(dir))
        .with_context(|| format!("cannot remove the cgroup {}", dir.display()))
}

/// Kills every process below `dir` and waits until none is left.
pub(super) fn kill_cgroup(dir: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    // Kernels before 5.14 have no cgroup.kill; there a process may fork while the list is read, hence the loop.
    while is_populated(dir) {
        if fs::write(dir.join("cgroup.kill"), "1").is_err() {
            kill_one_by_one(dir);
        }
        if Instant::now() >= deadline {
            bail!("processes in the cgroup {} do not die", dir.display());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn is_populated(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
}

fn kill_one_by_one(dir: &Path) {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
        // The process may have ended since.
        let _ = kill_process(pid, Signal::KILL);
    }
    subdirectories(dir).iter().for_each(|child| kill_one_by_one(child));
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(dir: &Path) -> Result<()> {
    missing_is_fine(fs::remove_dir_all(dir)).with_context(|| format!("cannot remove {}", dir.display()))
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_parse_and_live() -> Result<()> {
        let own = Owner::this_process()?;
        assert_eq!(Owner::parse(&own.name(7)), Some(Owner { ..own }));
        Ok(())
    }

    #[test]
    fn a_reused_pid_is_another_owner() -> Result<()> {
        let own = Owner::this_process()?;
        let namespace = own.pid_namespace;
        assert!(!own.is_dead(namespace));
        let earlier = Owner { start: own.start - 1, ..own };
        assert!(earlier.is_dead(namespace));
        assert!(!earlier.is_dead(namespace + 1), "another pid namespace cannot tell");
        Ok(())
    }

    #[test]
    fn foreign_names_are_left_alone() {
        for name in ["vipr", "vipr-lab", "vipr-lab-x-1-2-3", "system.slice", "vipr-laboratory-1-2-3-4"] {
            assert_eq!(Owner::parse(name), None, "{name}");
        }
    }
}
