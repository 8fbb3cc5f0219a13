//! The cgroup tree as kubelet makes it.
//!
//! With kubelet's cgroupfs driver, a pod's cgroup is `kubepods/burstable/pod<uid>`. With the systemd driver, it is
//! `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`. Both are below the path of
//! `--cgroup-root`, and have no middle part for pods of the Guaranteed class.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proxy_common::abi::CgroupId;

/// Number of levels below the root that the directory of all pods may lie at most.
const DEPTH_MAX: usize = 8;

/// Result of a look at the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tree {
    /// The cgroup of each pod, by uid.
    pub(crate) pods: BTreeMap<String, Pod>,
    /// The directories that the cgroups of pods appear in.
    pub(crate) parents: Vec<PathBuf>,
}

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    /// Id of the cgroup: its inode number (5.5).
    pub(crate) id: CgroupId,
    /// Directory of the cgroup.
    pub(crate) path: PathBuf,
}

/// Looks at the tree below `root`. Directories that cannot be read are left out: cgroups may vanish at any time.
pub(crate) fn look(root: &Path) -> Tree {
    let mut tree = Tree::default();
    descend(root, false, 0, &mut tree);
    tree
}

fn descend(directory: &Path, of_pods: bool, depth: usize, tree: &mut Tree) {
    if of_pods {
        tree.parents.push(directory.to_owned());
    }
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match uid(name) {
            Some(uid) if of_pods => {
                tree.pods.insert(uid, Pod { id: CgroupId(entry.ino()), path: entry.path() });
            }
            _ if depth < DEPTH_MAX => {
                let of_pods = of_pods || is_of_pods(name);
                descend(&entry.path(), of_pods, depth + 1, tree);
            }
            _ => {}
        }
    }
}

/// Returns whether a cgroup of this name contains all pods.
fn is_of_pods(name: &str) -> bool {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    name == "kubepods" || name.ends_with("-kubepods")
}

/// Returns the uid of the pod whose cgroup has this name.
fn uid(name: &str) -> Option<String> {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = match name.rsplit_once("-pod") {
        Some((_, uid)) => uid,
        None => name.strip_prefix("pod")?,
    };
    (!uid.is_empty()).then(|| uid.replace('_', "-"))
}

/// Returns whether a process is in the cgroup of one of these pods, or below. `file` is the contents of its
/// `/proc/<pid>/cgroup`. A process that names a cgroup of its own like a pod's only affects itself.
pub(crate) fn is_below(file: &str, pods: &BTreeSet<Arc<str>>) -> bool {
    let of_v2 = file.lines().find_map(|line| line.strip_prefix("0::"));
    of_v2.is_some_and(|path| path.split('/').filter_map(uid).any(|uid| pods.contains(uid.as_str())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_process_is_below_its_pods_cgroup() {
        let pods = ["aaaa-01", "bbbb-01"].map(Arc::from).into();
        for (file, wanted) in [
            ("0::/kubepods/burstable/podaaaa-01/0123456789\n", true),
            ("0::/kubepods/burstable/podaaaa-01\n", true),
            (
                "12:memory:/kubepods/podaaaa-02/x\n0::/kubelet.slice/kubelet-kubepods-podbbbb_01.slice/x.scope\n",
                true,
            ),
            ("1:name=systemd:/kubepods/podaaaa-01/x\n0::/system.slice\n", false),
            ("0::/../../podaaaa-01/x\n", true),
            ("0::/kubepods/burstable/podaaaa-011/x\n", false),
            ("0::/kubepods/burstable/podaaaa-02/x\n", false),
            ("0::/\n", false),
            ("", false),
        ] {
            assert_eq!(is_below(file, &pods), wanted, "{file:?}");
        }
    }

    #[test]
    fn cgroups_of_both_drivers_at_any_root() {
        let root = tempfile::tempdir().unwrap();
        let pods = [
            ("kubepods/podaaaa-01", Some("aaaa-01")),
            ("kubepods/burstable/podaaaa-02", Some("aaaa-02")),
            ("kubepods/burstable/podaaaa-02/0123456789", None),
            // This is no pod's cgroup: processes in a container name their own cgroups as they like.
            ("kubepods/burstable/podaaaa-02/podaaaa-03", None),
            ("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podbbbb_01.slice", Some("bbbb-01")),
            (
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
                 kubelet-kubepods-besteffort-podbbbb_02.slice/cri-containerd-x.scope",
                None,
            ),
            (
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
                 kubelet-kubepods-besteffort-podbbbb_02.slice",
                Some("bbbb-02"),
            ),
            // The uid of a static pod is a digest.
            ("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc0ffee.slice", Some("c0ffee")),
            ("system.slice/podman.service", None),
            ("machine.slice/libpod-conmon", None),
            ("podnobody", None),
        ];
        for (path, _) in pods {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        fs::write(root.path().join("kubepods/podfile"), "").unwrap();
        let want: BTreeMap<String, Pod> = pods
            .iter()
            .filter_map(|(path, uid)| {
                let path = root.path().join(path);
                Some(((*uid)?.to_owned(), Pod { id: CgroupId(fs::metadata(&path).unwrap().ino()), path }))
            })
            .collect();
        let tree = look(root.path());
        assert_eq!(tree.pods, want);
        let mut parents: Vec<_> = tree
            .parents
            .iter()
            .map(|parent| parent.strip_prefix(root.path()).unwrap().to_str().unwrap())
            .collect();
        parents.sort_unstable();
        assert_eq!(
            parents,
            [
                "kubelet.slice/kubelet-kubepods.slice",
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice",
                "kubepods",
                "kubepods.slice",
                "kubepods.slice/kubepods-burstable.slice",
                "kubepods/burstable",
            ]
        );
        assert_eq!(look(&root.path().join("nowhere")), Tree::default());
    }
}
