//! A directory of Kubernetes manifests as the source of objects.
//!
//! Files named `*.yaml`, `*.yml` and `*.json` directly in the directory are read, except hidden ones, as `kubectl apply
//! -f DIR` does. inotify reports changes, so a file that is written, renamed into place, or swapped by a symbolic link
//! takes effect at once. Changes that inotify does not report (behind a link that leads out of the directory, on a
//! network file system) take effect at the next periodic scan.
//!
//! All files together form one state: an object that no file has any more is gone. A file or object that cannot be read
//! is reported, and its last good state stays in force; so does the state of the whole directory if it vanishes.
//!
//! There is no control plane, so `controllers` does what a control plane would do for Services.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc::Sender;

use super::objects::Pod;
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::ObjectKey;
use crate::sources::error::SourceError;
use crate::sources::update::{Problem, Update};
pub(crate) use changed::Changed;
use changed::is_manifest;
pub(crate) use snapshot::Snapshot;
use watch::Watch;

mod bytes;
mod changed;
mod controllers;
mod documents;
mod file;
mod files;
mod id;
mod labels;
mod object;
mod parts;
pub(crate) mod snapshot;
mod watch;

#[cfg(test)]
mod tests;

/// Sends the content of `directory`, then every change of it, until the receiver is dropped. `node_name` is the name of
/// this node in lower case, `opt_out` selects the Pods that matter.
///
/// # Errors
/// The directory cannot be read at the start, or there is no inotify. Nothing has been sent then.
pub(crate) async fn run(
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
        // Reading a thousand files takes a while, and the runtime may have only one thread.
        let reading = tokio::task::spawn_blocking(move || {
            let result = snapshot.read(&changed);
            (snapshot, result)
        });
        // The task is cancelled only when the runtime shuts down.
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

/// Returns the Pod `key` from the first file in `directory` that has it, and the unreadable files before that one.
///
/// # Errors
/// The directory cannot be read.
pub(crate) fn pod(directory: &Path, key: &ObjectKey) -> Result<(Option<Pod>, Vec<Problem>), SourceError> {
    let names = manifest_names(directory)
        .map_err(|source| SourceError::Directory { path: directory.to_owned(), source })?;
    let mut unreadable = Vec::new();
    for name in names {
        match file::pod(&directory.join(&name), key) {
            Ok(None) => {}
            Ok(found) => return Ok((found, unreadable)),
            Err(error) => unreadable
                .push(Problem { object: name.to_string_lossy().into_owned(), reason: error.to_string() }),
        }
    }
    Ok((None, unreadable))
}

fn manifest_names(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name()));
    entries.filter(|name| name.as_ref().map_or(true, |name| is_manifest(name))).collect()
}
