//! A directory of Kubernetes manifests as the source of objects.
//!
//! Files named `*.yaml`, `*.yml` and `*.json` directly in the directory are read, hidden ones excepted, as
//! `kubectl apply -f DIR` does. They are followed by inotify, so a file that is written, renamed into place, or
//! swapped by a symbolic link takes effect at once; what inotify cannot see (a link that leads out of the
//! directory, a network file system) takes effect at the next look round.
//!
//! All files together are one state: an object that no file has any more is gone. What cannot be read is reported
//! and its last good state stays in force, that of the whole directory too should it vanish.
//!
//! There is no control plane, so what it would do to Services is done here (`controllers`).

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc::Sender;

use super::objects::Pod;
use super::{Problem, SourceError, Update};
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::ObjectKey;
pub use snapshot::{Reading, Snapshot};
use watch::Watch;

mod bytes;
mod controllers;
mod documents;
mod file;
mod object;
mod snapshot;
mod watch;

#[cfg(test)]
mod tests;

/// Which files may have changed.
#[derive(Debug, Default)]
pub struct Changed {
    /// These are read whatever their time stamps say: two writes may fall into one tick of the kernel's clock.
    pub files: BTreeSet<OsString>,
    /// Any: those whose time stamps differ are read too.
    pub any: bool,
}

/// Sends what is in `directory`, then every change of it, until the receiver is dropped. `node_name` is the name
/// of this node in lower case, `opt_out` tells which of its Pods matter.
///
/// # Errors
/// The directory cannot be read at the start, or there is no inotify. Nothing has been sent then.
pub async fn run(
    directory: PathBuf,
    node_name: &str,
    opt_out: &Rules,
    updates: Sender<Update>,
) -> Result<(), SourceError> {
    let mut watch = Watch::new(&directory)?;
    let mut snapshot = Snapshot::new(directory.clone(), node_name, opt_out);
    let mut changed = Changed { any: true, ..Changed::default() };
    let mut synced = false;
    loop {
        // Reading a thousand files takes a while, and the runtime may have one thread only.
        let reading = tokio::task::spawn_blocking(move || {
            let result = snapshot.read(&changed);
            (snapshot, result)
        });
        // It is cancelled only when the runtime shuts down.
        let Ok((read, result)) = reading.await else { return Ok(()) };
        snapshot = read;
        if !synced && let Some(source) = result.unreadable {
            return Err(SourceError::Directory { path: directory, source });
        }
        let mut messages = Vec::new();
        if !result.changes.is_empty() {
            messages.push(Update::Changes(result.changes));
        }
        messages.extend(result.problems.map(Update::Problems));
        if !synced {
            messages.push(Update::Synced);
            synced = true;
        }
        for message in messages {
            if updates.send(message).await.is_err() {
                return Ok(());
            }
        }
        changed = tokio::select! {
            changed = watch.next() => changed,
            () = updates.closed() => return Ok(()),
        };
    }
}

/// The Pod `key`, from the first file in `directory` that has it, and the files that cannot be read.
///
/// # Errors
/// The directory cannot be read.
pub fn pod(directory: &Path, key: &ObjectKey) -> Result<(Option<Pod>, Vec<Problem>), SourceError> {
    let names = || -> io::Result<BTreeSet<OsString>> {
        let entries = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name()));
        entries.filter(|name| name.as_ref().map_or(true, |name| is_manifest(name))).collect()
    };
    let failed = |source| SourceError::Directory { path: directory.to_owned(), source };
    let mut unreadable = Vec::new();
    for name in names().map_err(failed)? {
        match file::pod(&directory.join(&name), key) {
            Ok(None) => {}
            Ok(found) => return Ok((found, unreadable)),
            Err(error) => unreadable
                .push(Problem { object: name.to_string_lossy().into_owned(), reason: error.to_string() }),
        }
    }
    Ok((None, unreadable))
}

/// Whether a file of this name is a manifest.
fn is_manifest(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|extension| name.ends_with(extension))
}
