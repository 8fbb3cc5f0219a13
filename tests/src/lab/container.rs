//! A container as a container runtime makes it from an image and a pod's specification: an empty root with a program
//! and some mounts, read-only, and a few capabilities. The network namespace and the cgroup are those of the place;
//! process ids are the host's.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set, set_no_new_privs};
use seccompiler::BpfProgram;
use tempfile::TempDir;

use super::seccomp;

/// Path of the program in every container.
pub const PROGRAM: &str = "/program";

/// Value that the kubelet sets for pods of the priority class `system-node-critical`.
const OOM_SCORE_ADJ: &[u8] = b"-997";

/// A container, not yet running. The process that runs in it makes the mounts, in a namespace that ends with it. Clones
/// share the root directory.
#[derive(Clone, Debug)]
pub struct Container {
    root: Arc<TempDir>,
    root_path: CString,
    mounts: Vec<Mount>,
    capabilities: CapabilitySet,
    seccomp: Option<BpfProgram>,
}

/// A directory or file of the host in a container.
#[derive(Clone, Debug)]
struct Mount {
    source: CString,
    target: CString,
    read_only: bool,
}

impl Container {
    /// Makes a container of `program`, like an image made from scratch, with the mounts of every container: /proc, and
    /// /sys read-only. At first it has no capabilities. A program that is not static gets the host's libraries.
    ///
    /// # Errors
    /// If its root directory cannot be made.
    pub fn new(program: &Path) -> Result<Self> {
        let root = tempfile::Builder::new().prefix("container-").tempdir()?;
        let root_path = c_string(root.path())?;
        let mut container = Self {
            root: Arc::new(root),
            root_path,
            mounts: Vec::new(),
            capabilities: CapabilitySet::empty(),
            seccomp: None,
        };
        container.mount(program, PROGRAM, true)?;
        container.mount("/proc", "/proc", false)?;
        container.mount("/proc/sys", "/proc/sys", true)?;
        container.mount("/sys", "/sys", true)?;
        for libraries in ["/lib", "/lib64", "/usr/lib"].map(Path::new) {
            if libraries.exists() && !is_static(program)? {
                container.mount(libraries, &libraries.display().to_string(), true)?;
            }
        }
        Ok(container)
    }

    /// Gives the process a capability, by its name in Kubernetes: `NET_ADMIN`.
    ///
    /// # Errors
    /// If no capability has that name.
    pub fn capability(&mut self, name: &str) -> Result<()> {
        match CapabilitySet::from_name(name) {
            Some(capability) => self.capabilities |= capability,
            None => bail!("no capability {name}"),
        }
        Ok(())
    }

    /// Gives the process all capabilities, as in a privileged container.
    pub fn privileged(&mut self) {
        self.capabilities = CapabilitySet::all();
    }

    /// Withholds the system calls that container runtimes withhold by default from containers with the capabilities
    /// given so far.
    ///
    /// # Errors
    /// If the system calls of this machine's architecture are not known.
    pub fn seccomp_by_default(&mut self) -> Result<()> {
        self.seccomp = Some(seccomp::runtime_default(self.capabilities)?);
        Ok(())
    }

    /// Mounts `source`, a file or directory that exists, at `target`. A later mount covers earlier ones.
    ///
    /// # Errors
    /// If `source` does not exist.
    pub fn mount(&mut self, source: impl AsRef<Path>, target: &str, read_only: bool) -> Result<()> {
        let source = source.as_ref();
        let inside = self.root.path().join(target.trim_start_matches('/'));
        let of_host = ["/proc", "/sys"].iter().any(|host| target.starts_with(host) && target != *host);
        // Mount points below the host's directories exist already.
        if !of_host {
            make_mount_point(source, &inside)?;
        }
        self.mounts.push(Mount { source: c_string(source)?, target: c_string(&inside)?, read_only });
        Ok(())
    }

    /// Moves the calling process, which has a mount namespace of its own, into the container. Runs between fork and
    /// exec, so it only makes system calls.
    pub(super) fn enter(&self) -> io::Result<()> {
        let root = self.root_path.as_c_str();
        // May fail: root of a machine that is itself a container may lack the capability.
        let _as_by_default = fs_write(c"/proc/self/oom_score_adj", OOM_SCORE_ADJ);
        rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::mount::mount_bind(root, root)?;
        for Mount { source, target, read_only } in &self.mounts {
            rustix::mount::mount_bind(source.as_c_str(), target.as_c_str())?;
            if *read_only {
                remount_read_only(target)?;
            }
        }
        remount_read_only(root)?;
        rustix::process::chroot(root)?;
        rustix::process::chdir(c"/")?;
        let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
        for capability in all.filter(|one| !self.capabilities.contains(*one)) {
            match remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // The kernel has no further capabilities.
                Err(rustix::io::Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        set_no_new_privs(true)?;
        match &self.seccomp {
            // An error allocates nothing either: this is between fork and exec.
            Some(program) => {
                seccompiler::apply_filter(program).or(Err(io::ErrorKind::PermissionDenied.into()))
            }
            None => Ok(()),
        }
    }
}

fn remount_read_only(target: &CStr) -> io::Result<()> {
    Ok(rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")?)
}

/// Does the same as `std::fs::write`, without allocating.
fn fs_write(path: &CStr, bytes: &[u8]) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, bytes)?;
    Ok(())
}

fn make_mount_point(source: &Path, target: &Path) -> Result<()> {
    let kind = fs::metadata(source).with_context(|| source.display().to_string())?;
    let dir = if kind.is_dir() { target.to_path_buf() } else { target.parent().unwrap_or(target).to_owned() };
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    if !kind.is_dir() {
        fs::write(target, "").with_context(|| target.display().to_string())?;
    }
    Ok(())
}

fn c_string(path: impl Into<PathBuf>) -> Result<CString> {
    let path = path.into();
    CString::new(path.as_os_str().as_bytes()).with_context(|| format!("{path:?} has a zero byte"))
}

/// Returns whether an ELF program names no dynamic linker. Every dynamic program has the linker's path in its first
/// page.
fn is_static(program: &Path) -> Result<bool> {
    use std::io::Read as _;
    let mut head = Vec::new();
    let file = fs::File::open(program).with_context(|| program.display().to_string())?;
    file.take(4096).read_to_end(&mut head)?;
    Ok(!head.windows(7).any(|bytes| bytes == b"/ld-lin"))
}
