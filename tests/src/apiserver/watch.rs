//! The body of a watch response: one JSON document per line, until the client leaves, the time is up or a fault ends
//! it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::{Body, Bytes};
use futures::Stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Shared;
use super::faults::Gate;
use super::object::Object;
use super::resource::Resource;
use super::selector::Selection;
use super::status::Status;
use super::store::{Change, Item};

/// Annotation of the bookmark that ends the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// Largest number of objects of a streamed list that
/// [`ApiServer::hold_further_pages`](super::ApiServer::hold_further_pages) lets pass.
pub const STREAM_BEGINNING: usize = 100;

/// A watch in progress.
pub(super) struct Watch {
    pub(super) shared: Arc<Shared>,
    pub(super) resource: Resource,
    pub(super) selection: Selection,
    pub(super) items: mpsc::UnboundedReceiver<Item>,
    /// Revision that the client began at.
    pub(super) from: u64,
    pub(super) bookmarks: bool,
    pub(super) until: Instant,
    /// Flag that makes the connection break within its next write.
    pub(super) break_write: Arc<AtomicBool>,
    pub(super) cut_next_event: bool,
    /// Number of initial objects that may still be sent without checking for a hold; `None` if no list is being
    /// streamed.
    pub(super) beginning: Option<usize>,
}

impl Watch {
    pub(super) fn into_body(self) -> Body {
        Body::from_stream(self.into_lines())
    }

    fn into_lines(self) -> impl Stream<Item = io::Result<Bytes>> {
        futures::stream::unfold(Some(self), |watch| async move {
            let mut watch = watch?;
            loop {
                let item = match tokio::time::timeout_at(watch.until, watch.items.recv()).await {
                    Ok(item) => item?,
                    Err(_elapsed) => match watch.last() {
                        Ok(item) => item,
                        Err(bookmark) => return Some((Ok(bookmark?), None)),
                    },
                };
                watch.pass(&item).await;
                match watch.line(item) {
                    Ok(Some(line)) => {
                        watch.shared.state().events_sent.insert(watch.resource, std::time::Instant::now());
                        return Some((Ok(line), Some(watch)));
                    }
                    Ok(None) => {}
                    Err(broken) => return Some((Err(broken), None)),
                }
            }
        })
    }

    /// Waits while the streamed list is held.
    async fn pass(&mut self, item: &Item) {
        if !matches!(item, Item::Initial(_) | Item::InitialEnd(_)) {
            return;
        }
        let is_end = matches!(item, Item::InitialEnd(_));
        match &mut self.beginning {
            Some(left @ 1..) if !is_end => *left -= 1,
            Some(_) => self.shared.pass(Gate { resource: self.resource, further_pages: true }).await,
            None => {}
        }
        if is_end {
            self.beginning = None;
            self.shared.state().lists_sent.insert(self.resource, std::time::Instant::now());
        }
    }

    /// Returns, when the time is up, an item that is still to be sent, or the bookmark from which the client can
    /// resume.
    fn last(&mut self) -> Result<Item, Option<Bytes>> {
        // In this order: everything up to the revision is in the channel before the channel is read.
        let revision = self.shared.state().store.delivered(self.resource).max(self.from);
        let item = self.items.try_recv();
        item.map_err(|_empty| self.bookmarks.then(|| self.bookmark(revision, false)))
    }

    fn line(&mut self, item: Item) -> io::Result<Option<Bytes>> {
        Ok(match item {
            Item::Initial(object) => Some(self.event("ADDED", &object)),
            Item::InitialEnd(revision) => Some(self.bookmark(revision, true)),
            Item::Change(change) => self.change(&change),
            Item::Bookmark(revision) => self.bookmarks.then(|| self.bookmark(revision, false)),
            Item::Error(status) => Some(error_line(&status)),
            Item::Line(line) => Some(Bytes::from(line + "\n")),
            Item::Abort => return Err(io::ErrorKind::ConnectionReset.into()),
            Item::CutNextEvent => {
                self.cut_next_event = true;
                None
            }
        })
    }

    /// Returns the event of a change. An object that begins or ceases to match is reported as added or deleted,
    /// whatever its change was.
    fn change(&self, change: &Change) -> Option<Bytes> {
        let selected = [&change.before, &change.after]
            .map(|object| object.as_ref().filter(|object| self.selection.matches(object)));
        let line = match selected {
            [None, Some(after)] => self.event("ADDED", after),
            [Some(_), Some(after)] => self.event("MODIFIED", after),
            // The object as it last matched, at the revision of the change.
            [Some(before), None] => {
                let value = before.to_value(self.resource);
                let last = Object::new(self.resource, value, change.revision).ok()?;
                self.event("DELETED", &last)
            }
            [None, None] => return None,
        };
        if self.cut_next_event {
            self.break_write.store(true, Ordering::Relaxed);
        }
        Some(line)
    }

    fn event(&self, event: &str, object: &Object) -> Bytes {
        let mut line = Vec::with_capacity(object.as_item().len() + 128);
        line.extend_from_slice(format!(r#"{{"type":"{event}","object":"#).as_bytes());
        object.write(self.resource, &mut line);
        line.extend_from_slice(b"}\n");
        Bytes::from(line)
    }

    fn bookmark(&self, revision: u64, ends_initial: bool) -> Bytes {
        let mut metadata = json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
        if ends_initial {
            metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
        }
        let (kind, api_version) = (self.resource.kind(), self.resource.api_version());
        to_line(&json!({
            "type": "BOOKMARK",
            "object": { "kind": kind, "apiVersion": api_version, "metadata": metadata },
        }))
    }
}

/// Returns an ERROR event.
pub(super) fn error_line(status: &Status) -> Bytes {
    to_line(&json!({ "type": "ERROR", "object": status.to_value() }))
}

fn to_line(event: &Value) -> Bytes {
    Bytes::from(format!("{event}\n"))
}
