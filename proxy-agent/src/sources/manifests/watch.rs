//! Waits until files of a directory change.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};
use rustix::fs::FileType;
use tokio::time::{Instant, timeout, timeout_at};

use super::changed::{Changed, is_manifest};
use crate::sources::error::SourceError;

/// Time without an event after which a burst of changes ends.
const QUIET: Duration = Duration::from_millis(5);
/// Maximum duration of a burst of changes.
const BURST: Duration = Duration::from_millis(100);
/// Interval of scans of all files when there are no events.
const LOOK_ROUND: Duration = Duration::from_secs(10);
/// Interval at which a directory that has vanished is looked for.
const LOOK_FOR: Duration = Duration::from_millis(200);

/// An inotify watch on a path, which may later name another directory.
pub(super) struct Watch {
    path: PathBuf,
    events: EventStream<Vec<u8>>,
    watched: Option<WatchDescriptor>,
}

impl Watch {
    /// # Errors
    /// No inotify instance, or `path` is not a directory that can be read.
    pub(super) fn new(path: &Path) -> Result<Self, SourceError> {
        let inotify = Inotify::init().map_err(|source| SourceError::Inotify { source })?;
        let events = inotify
            .into_event_stream(vec![0; 16 * 1024])
            .map_err(|source| SourceError::Inotify { source })?;
        let mut watch = Self { path: path.to_owned(), events, watched: None };
        watch.add().map_err(|source| SourceError::Directory { path: path.to_owned(), source })?;
        Ok(watch)
    }

    /// Waits for the next change; a burst counts as one change.
    pub(super) async fn next(&mut self) -> Changed {
        let patience = if self.watched.is_some() { LOOK_ROUND } else { LOOK_FOR };
        let wait_until = Instant::now() + patience;
        let mut changed = Changed::default();
        while !changed.any && changed.files.is_empty() {
            match timeout_at(wait_until, self.events.next()).await {
                Ok(event) => self.note(event, &mut changed),
                Err(_elapsed) => changed.any = true,
            }
        }
        let burst_until = Instant::now() + BURST;
        while Instant::now() < burst_until
            && let Ok(event) = timeout(QUIET, self.events.next()).await
        {
            self.note(event, &mut changed);
        }
        if changed.any {
            self.follow();
        }
        changed
    }

    /// Watches the directory that the path names at this moment. The files are read afterwards, so that no change is
    /// missed in between.
    fn follow(&mut self) {
        let before = self.watched.take();
        if let Err(error) = self.add() {
            tracing::debug!(path = %self.path.display(), %error, "the manifest directory cannot be watched");
        }
        if let Some(before) = before.filter(|before| Some(before) != self.watched.as_ref()) {
            // Fails when the directory is gone and the kernel has dropped the watch already.
            let _ = self.events.watches().remove(before);
        }
    }

    fn add(&mut self) -> io::Result<()> {
        // Without MODIFY: a file is read after its writer has closed it, not while it is half written.
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        self.watched = Some(self.events.watches().add(&self.path, mask)?);
        Ok(())
    }

    fn note(&self, event: Option<io::Result<EventOwned>>, changed: &mut Changed) {
        // Errors of the stream, overflows and events of the directory itself have no name.
        let Some(Ok(EventOwned { name: Some(name), mask, .. })) = event else {
            changed.any = true;
            return;
        };
        if !is_manifest(&name) {
            // A directory through which links lead to manifests may have been swapped. Temporary files of editors cause
            // such events too, but comparing time stamps costs little.
            changed.any |= !mask.intersects(EventMask::CLOSE_WRITE | EventMask::ATTRIB);
        } else if !(mask.contains(EventMask::CREATE) && self.is_being_written(Path::new(&name))) {
            changed.files.insert(name);
        }
    }

    /// Returns whether the writer of a new file has yet to close it: the file is regular and not a second link to an
    /// old one.
    fn is_being_written(&self, name: &Path) -> bool {
        rustix::fs::lstat(self.path.join(name)).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 1
        })
    }
}
