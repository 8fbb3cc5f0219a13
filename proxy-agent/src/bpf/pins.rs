//! The pin directory: the layout of its pins, and the lock that admits one agent.
//!
//! ```text
//! <pin-dir>/links/<program>        the cgroup links: they outlive the agent, and every ABI version
//! <pin-dir>/links/<program>-<n>    the links to the network device with index n
//! <pin-dir>/made/…                 notes of changes elsewhere ([`super::notes`])
//! <pin-dir>/v<ABI_VERSION>/<MAP>   the maps of this version's layout
//! <pin-dir>/v<ABI_VERSION>/<MAP>-larger   a larger map, which replaces <MAP> when it holds the same elements
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use aya::maps::{MapError, MapInfo, MapType};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps::{self, Map, MapKind};

use super::bpf_fs::{self, BPF_FS};

/// Suffix of a pin that is to take the place of another pin. (A BPF file system allows no dots.)
const LARGER: &str = "-larger";

/// Reason why the pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory is neither on a BPF file system nor below its usual mount point.
    #[error("--pin-dir {0} is not on a BPF file system; choose a directory below {BPF_FS}")]
    Elsewhere(PathBuf),
    /// There is no BPF file system, and one mounted here would end with this container.
    #[error(
        "no BPF file system at {BPF_FS} for --pin-dir {0}, and one that is mounted in this container ends with it, and all \
         programs too; give the container the host's: a volume with hostPath {BPF_FS}, mounted at {BPF_FS}. Where the host has \
         none (`stat -fc %T {BPF_FS}` on the node is not bpf_fs), mount it there, or let this container, privileged, with \
         mountPropagation: Bidirectional"
    )]
    OfTheContainer(PathBuf),
    /// There is no BPF file system, and none could be mounted.
    #[error("no BPF file system at {BPF_FS} for --pin-dir {path}; mount one: mount -t bpf bpf {BPF_FS}")]
    NoBpfFs {
        /// The pin directory.
        path: PathBuf,
        /// Error of the mount.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("{path}: {source}")]
    File {
        /// File or directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another agent holds the directory.
    #[error("another agent is running on {0}; stop it first, or give this one another --pin-dir")]
    Locked(PathBuf),
}

/// Returns the kernel's name for the type of a map.
const fn map_type(map: &Map) -> MapType {
    match map.kind {
        MapKind::MmapableArray | MapKind::Array => MapType::Array,
        MapKind::PerCpuArray => MapType::PerCpuArray,
        MapKind::Hash => MapType::Hash,
        MapKind::LruHash => MapType::LruHash,
        MapKind::LpmTrie => MapType::LpmTrie,
        MapKind::SocketStorage => MapType::SkStorage,
        MapKind::RingBuffer => MapType::RingBuf,
    }
}

/// A pin directory.
#[derive(Clone, Debug)]
pub struct PinDir {
    root: PathBuf,
    /// Maps that are to be replaced by larger ones. The larger ones are pinned beside them.
    larger: BTreeSet<&'static str>,
}

/// State of this version's pinned maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The maps that hold Services are there and are kept.
    pub(crate) resumed: bool,
    /// Kept maps that are too small.
    pub(crate) too_small: BTreeSet<&'static str>,
}

/// Reason why the pinned maps cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such pin, or no permission to open it.
    #[error("{path}: {source}; is the agent running on this pin directory, and are you root?")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Error of aya.
        source: MapError,
    },
    /// The map cannot be mapped into memory.
    #[error("{path}: mmap: {source}")]
    Mmap {
        /// The pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl PinDir {
    /// Returns the directory at `root`, which need not exist yet.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf(), larger: BTreeSet::new() }
    }

    /// Returns the path of the directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the directory in which the maps of this ABI version are pinned.
    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    /// Returns the path at which a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        if self.larger.contains(name) {
            self.maps().join(format!("{name}{LARGER}"))
        } else {
            self.maps().join(name)
        }
    }

    /// Returns the same directory, with larger maps beside these maps, to take their place.
    pub(crate) fn with_larger(&self, maps: BTreeSet<&'static str>) -> Self {
        Self { root: self.root.clone(), larger: maps }
    }

    /// Replaces maps by the larger ones beside them, one by one. Each larger map holds the same elements, so any
    /// mixture of old and new maps works.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] names the larger map that could not take its place.
    pub(crate) fn replace_by_larger(self) -> Result<Self, PinError> {
        let settled = Self::new(&self.root);
        for name in &self.larger {
            let from = self.map(name);
            std::fs::rename(&from, settled.map(name))
                .map_err(|source| PinError::File { path: from, source })?;
        }
        Ok(settled)
    }

    /// Returns the directory in which links are pinned.
    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Returns the path at which a program's link is pinned.
    pub fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Makes the directories, mounting a BPF file system first if there is none.
    ///
    /// # Errors
    ///
    /// [`PinError`].
    pub fn create(&self) -> Result<(), PinError> {
        if !bpf_fs::holds(&self.root) {
            if !self.root.starts_with(BPF_FS) {
                return Err(PinError::Elsewhere(self.root.clone()));
            }
            if !bpf_fs::would_last() {
                return Err(PinError::OfTheContainer(self.root.clone()));
            }
            bpf_fs::mount().map_err(|source| PinError::NoBpfFs { path: self.root.clone(), source })?;
            tracing::info!(path = BPF_FS, "mounted a BPF file system");
        }
        for dir in [self.root.clone(), self.maps(), self.links()] {
            std::fs::create_dir_all(&dir).map_err(|source| PinError::File { path: dir, source })?;
        }
        Ok(())
    }

    /// Locks the directory for this process, until the lock is dropped.
    ///
    /// # Errors
    ///
    /// [`PinError::Locked`] when another process has it.
    pub(crate) fn lock(&self) -> Result<OwnedFd, PinError> {
        lock(&self.root)
    }

    /// Locks the maps, so that no other process watches at the same time.
    ///
    /// # Errors
    ///
    /// [`PinError::Locked`] when another process has the lock.
    pub(crate) fn lock_maps(&self) -> Result<OwnedFd, PinError> {
        lock(&self.maps())
    }

    /// Removes the pins of maps that this agent cannot use: maps of another layout, maps smaller than `entries` asks
    /// for that cannot grow, and larger maps that have not taken another map's place. Maps that refer to each other are
    /// removed together. Attached programs keep the maps that they use until the programs are replaced.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] when a pin cannot be removed.
    pub(crate) fn drop_unusable(&self, entries: impl Fn(&str) -> u32) -> Result<Found, PinError> {
        let (mut keep, mut too_small) = (true, BTreeSet::new());
        for spec in maps::ALL {
            let unfinished = self.maps().join(format!("{}{LARGER}", spec.name));
            if unfinished.exists() {
                remove(&unfinished)?;
            }
            let pin = self.map(spec.name);
            let info = MapInfo::from_pin(&pin).ok().filter(|info| fits(spec, info));
            let large_enough = info.as_ref().is_some_and(|info| info.max_entries() >= entries(spec.name));
            let grows = spec.grows;
            if info.is_some() && !large_enough && grows {
                too_small.insert(spec.name);
            }
            let usable = large_enough || info.is_some() && grows;
            if spec.independent && pin.exists() && !usable {
                remove(&pin)?;
            }
            // An earlier version of the agent had no such map, but has left the other maps as they should be.
            let is_new = spec.name == maps::NEW_AFFINITY && !pin.exists();
            keep &= usable || spec.independent || is_new;
        }
        if !keep {
            too_small.clear();
            for spec in maps::ALL.iter().filter(|spec| !spec.independent) {
                let pin = self.map(spec.name);
                if pin.exists() {
                    tracing::info!(map = spec.name, "replacing a pinned map of another layout or size");
                    remove(&pin)?;
                }
            }
        }
        Ok(Found { resumed: keep, too_small })
    }

    /// Removes the maps of every other ABI version. Must only be called after this version's programs have been
    /// attached.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] when a pin cannot be removed.
    pub(crate) fn drop_other_versions(&self) -> Result<(), PinError> {
        for dir in entries(&self.root)? {
            let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let version = name.strip_prefix('v').and_then(|version| version.parse::<u32>().ok());
            if version.is_some_and(|version| version != ABI_VERSION) {
                tracing::info!(path = %dir.display(), "removing the maps of another version");
                remove_tree(&dir)?;
            }
        }
        Ok(())
    }

    /// Returns whether the directory exists.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] when this process may not know.
    pub(crate) fn is_there(&self) -> Result<bool, PinError> {
        self.root.try_exists().map_err(|source| PinError::File { path: self.root.clone(), source })
    }

    /// Returns the directory of the notes ([`super::notes`]).
    pub(crate) fn notes(&self) -> PathBuf {
        self.root.join("made")
    }

    /// Removes everything, which also detaches the programs.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] when a pin cannot be removed.
    pub(crate) fn remove(&self) -> Result<(), PinError> {
        self.remove_pins()?;
        if self.root.exists() { remove_tree(&self.root) } else { Ok(()) }
    }

    /// Removes everything except the notes of changes elsewhere.
    ///
    /// # Errors
    ///
    /// [`PinError::File`] when a pin cannot be removed.
    pub(crate) fn remove_pins(&self) -> Result<(), PinError> {
        // Links are removed first: no program may run on after its maps have lost their names.
        let links = self.links();
        if links.exists() {
            remove_tree(&links)?;
        }
        let all = if self.root.exists() { entries(&self.root)? } else { Vec::new() };
        for path in all.iter().filter(|path| **path != self.notes()) {
            if path.is_dir() { remove_tree(path) } else { remove(path) }?;
        }
        Ok(())
    }
}

/// Returns whether a pinned map has the layout of `spec`.
fn fits(spec: &Map, info: &MapInfo) -> bool {
    // A ring buffer has neither keys nor values.
    let value = if spec.kind == MapKind::RingBuffer { 0 } else { spec.value };
    info.map_type().is_ok_and(|found| found == map_type(spec))
        && info.key_size() as usize == spec.key
        && info.value_size() as usize == value
}

fn lock(path: &Path) -> Result<OwnedFd, PinError> {
    let file = |source| PinError::File { path: path.to_path_buf(), source };
    let dir = File::open(path).map_err(file)?;
    match dir.try_lock() {
        Ok(()) => Ok(dir.into()),
        Err(std::fs::TryLockError::WouldBlock) => Err(PinError::Locked(path.to_path_buf())),
        Err(std::fs::TryLockError::Error(source)) => Err(file(source)),
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    let file = |source| PinError::File { path: dir.to_path_buf(), source };
    let listing = std::fs::read_dir(dir).map_err(file)?;
    listing.map(|entry| entry.map(|entry| entry.path()).map_err(file)).collect()
}

fn remove(path: &Path) -> Result<(), PinError> {
    std::fs::remove_file(path).map_err(|source| PinError::File { path: path.to_path_buf(), source })
}

fn remove_tree(dir: &Path) -> Result<(), PinError> {
    std::fs::remove_dir_all(dir).map_err(|source| PinError::File { path: dir.to_path_buf(), source })
}
