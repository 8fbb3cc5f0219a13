//! `proxy-agent cleanup`: takes back everything that an agent has left on this host.
//!
//! | what | how it is known as ours |
//! |---|---|
//! | links, maps, programs | they are pinned in the pin directory |
//! | clsact filters | by their priority and handle |
//! | clsact queueing disciplines | by a note; one that holds another's filter stays |
//! | reserved ports | by a note |
//! | files in the run directory | they are named after the pin directory |
//!
//! If something cannot be removed, its note stays and the rest goes. A BPF file system that was mounted for the pins
//! stays: others may have pinned something there since.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::bpf::notes::{Note, Notes};
use crate::bpf::pins::{PinDir, PinError};
use crate::devices;
use crate::host::FollowError;
use crate::observe::reasons;
use crate::observe::report;

/// Reason why something stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CleanupError {
    /// The pin directory cannot be used, or an agent uses it.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The runtime cannot be started.
    #[error("a runtime: {0}")]
    Runtime(#[source] io::Error),
    /// The devices cannot be listed.
    #[error(transparent)]
    Devices(#[from] FollowError),
    /// A file of the run directory cannot be removed.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Something could not be removed; the rest is gone.
    #[error("not everything could be removed: {}; the rest is gone, run it again with more rights", .0.join("; "))]
    Left(Vec<String>),
}

/// Removes everything that an agent has left. `state` is the agent's state file. Finding nothing is no error.
///
/// # Errors
///
/// [`CleanupError`].
pub(crate) fn run(pins: &PinDir, state: &Path) -> Result<(), CleanupError> {
    let pinned = pins.is_there()?;
    // Without the directory there is no lock either: somebody has removed it, maybe under a running agent.
    if !pinned && UnixStream::connect(reasons::socket(state)).is_ok() {
        return Err(PinError::Locked(pins.root().to_path_buf()).into());
    }
    let lock = if pinned { Some(pins.lock()?) } else { None };
    let left = take_back(pins)?;
    if pinned {
        if left.is_empty() { pins.remove() } else { pins.remove_pins() }?;
    }
    drop(lock);
    for path in [reasons::socket(state), report::beside(state), state.to_path_buf()] {
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CleanupError::File { path, source });
            }
            _ => {}
        }
    }
    if left.is_empty() { Ok(()) } else { Err(CleanupError::Left(left)) }
}

/// Takes back what is outside of the pin directory. Returns the failures.
fn take_back(pins: &PinDir) -> Result<Vec<String>, CleanupError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CleanupError::Runtime)?;
    let filters = runtime.block_on(devices::remove_filters(pins))?;
    let mut left: Vec<String> =
        filters.into_iter().map(|(device, error)| format!("filters of {device}: {error}")).collect();
    let notes = Notes::of(pins);
    for note in notes.all()? {
        if let Note::Ports(ports) = &note {
            match devices::reserved_ports::release(ports) {
                Ok(()) => notes.remove(&note)?,
                Err(error) => left.push(error.to_string()),
            }
        }
    }
    Ok(left)
}
