//! The objects, their history, and the watches that are sent it.
//!
//! One revision counter serves all resources, as in etcd. The history answers watches that resume, and pages of lists
//! that began at an earlier revision. An older revision is answered with 410 Expired.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::object::{Key, Object};
use super::resource::Resource;
use super::selector::Selection;
use super::status::Status;

/// Number of changes kept per resource.
const HISTORY: usize = 100_000;

type Objects = BTreeMap<Key, Arc<Object>>;

/// One change: without `before` it is a creation, without `after` a deletion.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) before: Option<Arc<Object>>,
    pub(super) after: Option<Arc<Object>>,
}

/// Message to a watch.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// An object of the initial state.
    Initial(Arc<Object>),
    /// End of the initial state, at this revision.
    InitialEnd(u64),
    Change(Arc<Change>),
    Bookmark(u64),
    /// An ERROR event.
    Error(Status),
    /// Order to break the connection.
    Abort,
    /// Order to cut the next event in the middle.
    CutNextEvent,
    /// A line that is sent as it is.
    Line(String),
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) revision: u64,
    pub(super) objects: Vec<Arc<Object>>,
    /// Items that are sent as they are.
    pub(super) nonsense: Vec<String>,
    /// Number of items on further pages.
    pub(super) remaining: usize,
}

/// Beginning of a watch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    /// The current state.
    State,
    /// The next change.
    Latest,
    /// The first change after this revision.
    Revision(u64),
}

#[derive(Debug)]
struct Watch {
    from: u64,
    items: mpsc::UnboundedSender<Item>,
}

#[derive(Debug, Default)]
struct Table {
    objects: Objects,
    history: VecDeque<Arc<Change>>,
    /// Newest revision whose change is no longer in the history.
    compacted: u64,
    watches: Vec<Watch>,
    /// Changes held back from the watches until they are released.
    held: Option<Vec<Arc<Change>>>,
    /// Number of changes to collect in `shuffled` before they are sent newest first; 0 to send each at once.
    reorder: usize,
    shuffled: Vec<Arc<Change>>,
    /// Number of changes that are still to be sent twice.
    duplicate: usize,
    /// Items of lists that are no objects.
    nonsense: Vec<String>,
}

impl Table {
    fn publish(&mut self, change: Change) {
        let change = Arc::new(change);
        self.history.push_back(Arc::clone(&change));
        if self.history.len() > HISTORY
            && let Some(lost) = self.history.pop_front()
        {
            self.compacted = lost.revision;
        }
        match &mut self.held {
            Some(held) => held.push(change),
            None => self.deliver(change),
        }
    }

    fn deliver(&mut self, change: Arc<Change>) {
        if self.reorder == 0 {
            return self.send_change(&change);
        }
        self.shuffled.push(change);
        if self.shuffled.len() == self.reorder {
            self.reorder = 0;
            for change in std::mem::take(&mut self.shuffled).into_iter().rev() {
                self.send_change(&change);
            }
        }
    }

    fn send_change(&mut self, change: &Arc<Change>) {
        let times = if self.duplicate > 0 { 2 } else { 1 };
        self.duplicate = self.duplicate.saturating_sub(1);
        self.watches.retain(|watch| {
            change.revision <= watch.from
                || (0..times).all(|_| watch.items.send(Item::Change(Arc::clone(change))).is_ok())
        });
    }

    /// Returns the objects as they were after revision `at`.
    fn view(&self, at: u64) -> Result<Cow<'_, Objects>, Status> {
        if at < self.compacted {
            return Err(Status::too_old(at, self.compacted));
        }
        let mut view = Cow::Borrowed(&self.objects);
        for change in self.history.iter().rev().take_while(|change| change.revision > at) {
            match (&change.before, &change.after) {
                (Some(before), _) => {
                    view.to_mut().insert(before.key.clone(), Arc::clone(before));
                }
                (None, Some(after)) => {
                    view.to_mut().remove(&after.key);
                }
                (None, None) => {}
            }
        }
        Ok(view)
    }

    /// Returns the newest revision up to which nothing is held back from the watches.
    fn delivered(&self, revision: u64) -> u64 {
        let held = self.held.iter().flatten().chain(&self.shuffled).map(|change| change.revision).min();
        held.map_or(revision, |held| held - 1)
    }
}

/// All objects.
#[derive(Debug, Default)]
pub(super) struct Store {
    revision: u64,
    tables: BTreeMap<Resource, Table>,
}

impl Store {
    fn table(&mut self, resource: Resource) -> &mut Table {
        self.tables.entry(resource).or_default()
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&mut self, resource: Resource, key: &Key) -> Option<Arc<Object>> {
        self.table(resource).objects.get(key).map(Arc::clone)
    }

    pub(super) fn all(&mut self, resource: Resource) -> Vec<Arc<Object>> {
        self.table(resource).objects.values().map(Arc::clone).collect()
    }

    /// Creates or replaces an object. An object that would not change keeps its revision, and no watch is sent an
    /// event.
    pub(super) fn put(
        &mut self,
        resource: Resource,
        mut value: Value,
        announce: bool,
    ) -> Result<Arc<Object>, String> {
        let key = Key::of(resource, &value)?;
        let before = self.get(resource, &key);
        let old = before.as_ref().map(|object| object.to_value(resource));
        value["kind"] = json!(resource.kind());
        value["apiVersion"] = json!(resource.api_version());
        self.stamp(&mut value, old.as_ref());
        if let (Some(before), Some(old)) = (&before, &old) {
            value["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
            if value == *old {
                return Ok(Arc::clone(before));
            }
        }
        let after = Arc::new(Object::new(resource, value, self.revision + 1)?);
        self.commit(resource, before, Some(Arc::clone(&after)), announce);
        Ok(after)
    }

    /// Sets the metadata that the server itself writes: taken from the existing object, or else made.
    fn stamp(&self, value: &mut Value, old: Option<&Value>) {
        let next = self.revision + 1;
        let made = json!({
            "uid": format!("{:08x}-0000-4000-8000-{:012x}", next >> 48, next & 0xffff_ffff_ffff),
            "creationTimestamp": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        for field in ["uid", "creationTimestamp"] {
            if value["metadata"][field].is_null() {
                let kept = old.map(|old| &old["metadata"][field]).filter(|kept| !kept.is_null());
                value["metadata"][field] = kept.unwrap_or(&made[field]).clone();
            }
        }
    }

    /// Delivers an object again: with a new revision, otherwise unchanged.
    pub(super) fn touch(&mut self, resource: Resource, key: &Key) -> Result<bool, String> {
        let Some(before) = self.get(resource, key) else { return Ok(false) };
        let after = Object::new(resource, before.to_value(resource), self.revision + 1)?;
        self.commit(resource, Some(before), Some(Arc::new(after)), true);
        Ok(true)
    }

    pub(super) fn delete(&mut self, resource: Resource, key: &Key, announce: bool) -> Option<Arc<Object>> {
        let before = self.get(resource, key)?;
        self.commit(resource, Some(Arc::clone(&before)), None, announce);
        Some(before)
    }

    fn commit(
        &mut self,
        resource: Resource,
        before: Option<Arc<Object>>,
        after: Option<Arc<Object>>,
        announce: bool,
    ) {
        self.revision += 1;
        let revision = self.revision;
        let table = self.table(resource);
        match (&before, &after) {
            (_, Some(after)) => {
                table.objects.insert(after.key.clone(), Arc::clone(after));
            }
            (Some(before), None) => {
                table.objects.remove(&before.key);
            }
            (None, None) => {}
        }
        if announce {
            table.publish(Change { revision, before, after });
        }
    }

    /// Returns the selected objects at revision `at` (or the current one) that follow `after`, at most `limit`.
    pub(super) fn page(
        &mut self,
        resource: Resource,
        selection: &Selection,
        at: Option<u64>,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, Status> {
        let revision = at.unwrap_or(self.revision);
        if revision > self.revision {
            return Err(Status::too_large(revision, self.revision));
        }
        let view = match at {
            Some(at) => self.table(resource).view(at)?,
            None => Cow::Borrowed(&self.table(resource).objects),
        };
        let mut selected = view
            .values()
            .filter(|object| after.is_none_or(|after| object.key > *after) && selection.matches(object));
        let objects = selected.by_ref().take(limit).map(Arc::clone).collect();
        let remaining = selected.count();
        let table = self.table(resource);
        let nonsense = if after.is_none() { table.nonsense.clone() } else { Vec::new() };
        Ok(Page { revision, objects, nonsense, remaining })
    }

    /// Begins a watch: the events that it has to catch up with are already in the channel. Also returns the revision
    /// after which the watch is sent changes.
    pub(super) fn watch(
        &mut self,
        resource: Resource,
        selection: &Selection,
        start: Start,
        mark_initial_end: bool,
    ) -> Result<(mpsc::UnboundedReceiver<Item>, u64), Status> {
        let revision = self.revision;
        let table = self.table(resource);
        let (items, receiver) = mpsc::unbounded_channel();
        // Sending cannot fail: this function still holds the receiver.
        let send = |item| drop(items.send(item));
        let from = match start {
            Start::Latest => revision,
            Start::State => {
                let selected = table.objects.values().filter(|object| selection.matches(object));
                selected.for_each(|object| send(Item::Initial(Arc::clone(object))));
                table.nonsense.iter().for_each(|object| send(Item::Line(added(object))));
                if mark_initial_end {
                    send(Item::InitialEnd(revision));
                }
                revision
            }
            Start::Revision(from) if from < table.compacted => {
                return Err(Status::too_old(from, table.compacted));
            }
            Start::Revision(from) => {
                let delivered = table.delivered(revision);
                let missed = table.history.iter().filter(|c| c.revision > from && c.revision <= delivered);
                missed.for_each(|change| send(Item::Change(Arc::clone(change))));
                from
            }
        };
        table.watches.push(Watch { from, items });
        Ok((receiver, from))
    }

    /// Returns the number of open watches of the resource.
    pub(super) fn open_watches(&mut self, resource: Resource) -> usize {
        let watches = &mut self.table(resource).watches;
        watches.retain(|watch| !watch.items.is_closed());
        watches.len()
    }

    /// Sends an item to every watch.
    pub(super) fn tell_watches(&mut self, item: &Item) {
        for table in self.tables.values_mut() {
            table.watches.retain(|watch| watch.items.send(item.clone()).is_ok());
        }
    }

    /// Adds an item that is no object: it is sent to the watches once, and is part of every later list.
    pub(super) fn add_nonsense(&mut self, resource: Resource, object: &str) {
        self.table(resource).nonsense.push(object.to_owned());
        self.send_line(resource, &added(object));
    }

    /// Removes the items that are no objects from later lists.
    pub(super) fn remove_nonsense(&mut self, resource: Resource) {
        self.table(resource).nonsense.clear();
    }

    /// Sends a line to every watch of a resource.
    pub(super) fn send_line(&mut self, resource: Resource, line: &str) {
        self.table(resource).watches.retain(|watch| watch.items.send(Item::Line(line.to_owned())).is_ok());
    }

    /// Ends every watch after the items that were sent to it.
    pub(super) fn end_watches(&mut self) {
        self.tables.values_mut().for_each(|table| table.watches.clear());
    }

    /// Sends a bookmark to every watch. The bookmark never names a revision whose changes are held back.
    pub(super) fn bookmark(&mut self) {
        let revision = self.revision;
        for table in self.tables.values_mut() {
            let delivered = table.delivered(revision);
            table.watches.retain(|w| w.items.send(Item::Bookmark(delivered.max(w.from))).is_ok());
        }
    }

    /// Returns the newest revision that a bookmark may name.
    pub(super) fn delivered(&mut self, resource: Resource) -> u64 {
        let revision = self.revision;
        self.table(resource).delivered(revision)
    }

    /// Forgets the history: every revision that a client has seen is then too old.
    pub(super) fn compact(&mut self) {
        self.revision += 1;
        let revision = self.revision;
        // Every resource gets a table, so that one that was never requested is compacted too.
        for resource in Resource::ALL {
            let table = self.table(resource);
            table.history.clear();
            table.compacted = revision;
        }
    }

    /// Holds back changes from the watches.
    pub(super) fn hold(&mut self, resource: Resource) {
        self.table(resource).held.get_or_insert_default();
    }

    /// Sends the changes that were held back from the watches.
    pub(super) fn release(&mut self, resource: Resource) {
        let table = self.table(resource);
        for change in table.held.take().unwrap_or_default() {
            table.deliver(change);
        }
    }

    /// Sends the next `count` changes newest first, once all of them have happened.
    pub(super) fn reorder(&mut self, resource: Resource, count: usize) {
        self.table(resource).reorder = count;
    }

    /// Sends each of the next `count` changes twice.
    pub(super) fn duplicate(&mut self, resource: Resource, count: usize) {
        self.table(resource).duplicate = count;
    }
}

/// Returns the ADDED event of an object that is sent as it is.
fn added(object: &str) -> String {
    format!(r#"{{"type":"ADDED","object":{object}}}"#)
}
