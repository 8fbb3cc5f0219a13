//! The network namespaces of this host: those of its processes, and those that a name keeps alive.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{fstat, fstatfs};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, clock_gettime};

use crate::host::sockets::error::SocketsError;

/// `f_type` of the file system that namespaces live in (`NSFS_MAGIC` in `linux/magic.h`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Places in which network namespaces are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// The procfs of our own pid namespace, which has to be the host's. The network namespace of each process is in
    /// `<pid>/ns/net`, its descriptors are in `<pid>/fd`. (Threads that left the namespace of their process are not
    /// examined.)
    pub(crate) proc: PathBuf,
    /// Directories whose entries are namespaces. A directory that does not exist is skipped.
    pub(crate) named: Vec<PathBuf>,
}

impl Default for Places {
    /// Returns `/proc`, and the directories in which iproute2, CNI runtimes and Docker keep namespaces.
    fn default() -> Self {
        Self {
            proc: PathBuf::from("/proc"),
            named: ["/run/netns", "/run/docker/netns", "/var/run/netns", "/var/run/docker/netns"]
                .map(PathBuf::from)
                .into(),
        }
    }
}

/// An open namespace: it exists at least as long as this value.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(crate) path: PathBuf,
    pub(crate) fd: File,
    /// Whether this is the namespace that the agent runs in, which is the host's.
    pub(crate) of_host: bool,
}

impl Namespace {
    /// Moves the calling thread into the namespace.
    pub(super) fn enter(&self) -> Result<(), SocketsError> {
        let moved = move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network));
        moved.map_err(|error| SocketsError::Enter {
            name: self.path.display().to_string(),
            source: error.into(),
        })
    }
}

/// Result of [`find`].
#[derive(Debug)]
pub(super) struct Namespaces {
    /// The namespaces, each once, however many paths lead to it.
    pub(crate) namespaces: Vec<Namespace>,
    /// Number of processes whose namespace may not be opened.
    pub(crate) hidden: usize,
}

pub(super) fn find(places: &Places) -> Result<Namespaces, SocketsError> {
    let processes = processes(&places.proc)
        .map_err(|source| SocketsError::Processes { path: places.proc.clone(), source })?
        .map(|process| process.join("ns/net"));
    // If no namespace has a name, the directory does not exist either.
    let named = places.named.iter().flat_map(|dir| entries(dir).unwrap_or_default());

    // This thread has not entered another namespace yet, so this is the namespace of the process.
    let own = File::open("/proc/thread-self/ns/net").ok().and_then(|fd| identity(&fd));
    let mut found = Namespaces { namespaces: Vec::new(), hidden: 0 };
    let mut seen = BTreeSet::new();
    for path in processes.chain(named) {
        match File::open(&path) {
            Ok(fd) => {
                if let Some(identity) = identity(&fd)
                    && seen.insert(identity)
                {
                    found.namespaces.push(Namespace { path, fd, of_host: Some(identity) == own });
                }
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => found.hidden += 1,
            // The process has ended.
            Err(_) => {}
        }
    }
    Ok(found)
}

/// Returns device and inode, which identify a namespace. Returns `None` for a file that is no namespace, such as a
/// mount point that iproute2 left, or whose mount this mount namespace does not see.
fn identity(file: &File) -> Option<(u64, u64)> {
    let is_namespace = fstatfs(file).is_ok_and(|fs| fs.f_type == NSFS_MAGIC);
    let stat = fstat(file).ok().filter(|_| is_namespace)?;
    Some((stat.st_dev, stat.st_ino))
}

/// Returns the directories of processes in a procfs.
pub(super) fn processes(proc: &Path) -> std::io::Result<impl Iterator<Item = PathBuf>> {
    Ok(entries(proc)?.into_iter().filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    }))
}

fn entries(dir: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}

/// Runs work that enters namespaces on a thread of its own, which ends afterwards, so that no other code ever runs in
/// the wrong namespace. Also returns the CPU time of the work.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> Result<(T, Duration), SocketsError> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("sockets".to_owned());
        let thread = builder
            .spawn_scoped(scope, || {
                let done = work();
                let cpu = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
                (done, cpu)
            })
            .map_err(SocketsError::Thread)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
