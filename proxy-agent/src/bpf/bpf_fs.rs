//! The BPF file system that holds the pins, and whether such a file system mounted here outlives this process's
//! container.
//!
//! A mount belongs to a mount namespace. A container has its own mount namespace, which ends with the container. The
//! pins would go with it, and with them every program, at each restart. Only a file system mounted below a shared mount
//! (proc_pid_mountinfo(5)) is also mounted where the shared mount came from: Kubernetes calls this `mountPropagation:
//! Bidirectional`.

use std::fs;
use std::io;
use std::path::Path;

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
pub(super) const BPF_FS: &str = "/sys/fs/bpf";

/// Returns whether `path`, or its deepest existing ancestor, is on a BPF file system.
pub(super) fn holds(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists());
    let magic = existing.and_then(|path| rustix::fs::statfs(path).ok()).map(|fs| fs.f_type as u32);
    magic == Some(BPF_FS_MAGIC)
}

/// Mounts a BPF file system at [`BPF_FS`].
pub(super) fn mount() -> io::Result<()> {
    Ok(rustix::mount::mount("bpf", BPF_FS, "bpf", rustix::mount::MountFlags::empty(), None)?)
}

/// Returns whether a BPF file system mounted at [`BPF_FS`] stays when this process and the others in its container end.
pub(super) fn would_last() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    is_shared(&mounts, Path::new(BPF_FS)) || !in_container()
}

/// Returns whether a file system mounted at `path` is mounted elsewhere too. `mounts` has the format of
/// /proc/self/mountinfo.
fn is_shared(mounts: &str, path: &Path) -> bool {
    let covering = mounts.lines().filter_map(|line| {
        let (mount, _) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(4);
        let point = fields.next()?;
        // Optional fields stand between the options and the dash.
        let is_shared = fields.skip(1).any(|field| field.starts_with("shared:"));
        path.starts_with(point).then_some((point.len(), is_shared))
    });
    // Of two mounts at the same point, the later one covers the other.
    covering.max_by_key(|(depth, _)| *depth).is_some_and(|(_, is_shared)| is_shared)
}

/// Returns whether this process's mount namespace is a container's. The host's mount namespace is that of process 1,
/// and on a host this process is never process 1.
fn in_container() -> bool {
    // Set in every pod, also in a pod whose first process is a shell or an init of its own.
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    // A mount namespace that this process may not read is another one than its own.
    let [of_first, own] = ["1", "self"].map(|process| fs::read_link(format!("/proc/{process}/ns/mnt")).ok());
    in_pod || std::process::id() == 1 || of_first.is_none() || of_first != own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_covers_the_path_counts() {
        let root = "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n";
        let private = "2 1 8:1 / / rw - overlay overlay rw\n";
        let sys = "3 1 0:20 / /sys rw,nosuid - sysfs sysfs rw\n";
        let shared_sys = "3 1 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n";
        let slave = "4 3 0:20 /fs/bpf /sys/fs/bpf rw master:9 - sysfs sysfs rw\n";
        let bidirectional = "4 3 0:20 /fs/bpf /sys/fs/bpf rw master:9 shared:9 - sysfs sysfs rw\n";
        let beside = "5 3 0:30 / /sys/fs/bpf2 rw shared:10 - bpf bpf rw\n";
        let odd = "6 1 0:31 / /sys rw - fuse shared:1 rw\n";
        for (mounts, want) in [
            (vec![], false),
            (vec![root], true),
            (vec![private], false),
            (vec![root, sys], false),
            (vec![private, shared_sys], true),
            (vec![private, shared_sys, slave], false),
            (vec![private, sys, bidirectional], true),
            (vec![private, bidirectional, sys], true),
            (vec![private, sys, beside], false),
            (vec![root, shared_sys, odd], false),
        ] {
            assert_eq!(is_shared(&mounts.concat(), Path::new(BPF_FS)), want, "{mounts:?}");
        }
    }
}
