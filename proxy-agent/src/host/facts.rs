//! Facts about this host that the configuration needs.

use std::io;
use std::path::{Path, PathBuf};

/// Facts about this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Name of the host, as the kernel has it.
    pub(crate) name: String,
    /// Whether the host's kernel has IPv6.
    pub(crate) ipv6: bool,
    /// The cgroup v2 directory whose processes are served.
    pub cgroup: PathBuf,
}

/// Reason why this host cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no cgroup v2 hierarchy.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) or boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    NoCgroup2,
    /// The path is not a directory of a cgroup v2 hierarchy.
    #[error(
        "--cgroup-path {0}: not a directory of a cgroup v2 hierarchy; give the root of the host's, which is /sys/fs/cgroup \
         or, on hybrid hosts, /sys/fs/cgroup/unified"
    )]
    NotCgroup2(PathBuf),
    /// A file of /proc cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl Host {
    /// Reads the facts. `cgroup_path` is the directory to serve; without it, the root of the hierarchy is taken.
    ///
    /// # Errors
    ///
    /// [`HostError`]; without a cgroup v2 hierarchy nothing can be served.
    pub fn look(cgroup_path: Option<&Path>) -> Result<Self, HostError> {
        Ok(Self {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            ipv6: has_ipv6(),
            cgroup: match cgroup_path {
                Some(path) => cgroup2(path)?,
                None => cgroup_root()?,
            },
        })
    }
}

/// Returns whether the kernel has IPv6 in this network namespace, and it is not switched off.
fn has_ipv6() -> bool {
    let switch = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    Path::new("/proc/net/if_inet6").exists() && !switch.is_ok_and(|switch| switch.trim() == "1")
}

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u32 = 0x6367_7270;

fn cgroup2(path: &Path) -> Result<PathBuf, HostError> {
    match rustix::fs::statfs(path) {
        Ok(fs) if fs.f_type as u32 == CGROUP2_MAGIC => Ok(path.to_path_buf()),
        _ => Err(HostError::NotCgroup2(path.to_path_buf())),
    }
}

/// Returns the shortest mount point of a cgroup v2 hierarchy: `/sys/fs/cgroup`, or on hybrid hosts
/// `/sys/fs/cgroup/unified`.
fn cgroup_root() -> Result<PathBuf, HostError> {
    let path = PathBuf::from("/proc/self/mountinfo");
    let mounts = match std::fs::read_to_string(&path) {
        Ok(mounts) => mounts,
        Err(source) => return Err(HostError::File { path, source }),
    };
    mount_points(&mounts, "cgroup2").min_by_key(|path| path.as_os_str().len()).ok_or(HostError::NoCgroup2)
}

/// Returns the mount points of a file system type. `mounts` has the format of /proc/self/mountinfo (proc(5)).
fn mount_points<'a>(mounts: &'a str, fs_type: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    mounts.lines().filter_map(move |line| {
        let (mount, fs) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        (fs.split(' ').next()? == fs_type).then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_root_is_found_on_unified_and_hybrid_hosts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw\n\
                      32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let unified = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                       40 30 0:27 /sub /mnt/other/cgroup rw - cgroup2 cgroup2 rw\n";
        for (mounts, want) in
            [(hybrid, Some("/sys/fs/cgroup/unified")), (unified, Some("/sys/fs/cgroup")), ("", None)]
        {
            let root = mount_points(mounts, "cgroup2").min_by_key(|path| path.as_os_str().len());
            assert_eq!(root, want.map(Into::into));
        }
    }
}
