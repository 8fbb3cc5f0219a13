//! The objects, their history, and the watches that are told of it.
//!
//! One revision counter serves all resources, as etcd's does. The history answers watches that resume and pages of
//! lists that began at an earlier revision; what is older than it is 410 Expired.

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

/// Changes kept per resource.
const HISTORY: usize = 100_000;

type Objects = BTreeMap<Key, Arc<Object>>;

/// One change: absent before is a creation, absent after a deletion.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) before: Option<Arc<Object>>,
    pub(super) after: Option<Arc<Object>>,
}

/// What a watch is sent.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// An object of the initial state.
    Initial(Arc<Object>),
    /// The initial state is complete, at this revision.
    InitialEnd(u64),
    Change(Arc<Change>),
    Bookmark(u64),
    /// An ERROR event.
    Error(Status),
    /// The connection breaks.
    Abort,
    /// The next event is cut in the middle.
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
    /// How many more there are.
    pub(super) remaining: usize,
}

/// Where a watch begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    /// With the current state.
    State,
    /// With what comes next.
    Latest,
    /// After this revision.
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
    /// The newest revision whose change the history has lost.
    compacted: u64,
    watches: Vec<Watch>,
    /// Changes kept from the watches until they are released.
    held: Option<Vec<Arc<Change>>>,
    /// Changes collected until there are `reorder` of them, then sent newest first.
    reorder: usize,
    shuffled: Vec<Arc<Change>>,
    /// How many changes are sent twice.
    duplicate: usize,
    /// What lists hold besides objects.
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

    /// The objects as they were after revision `at`.
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

    /// The newest revision up to which nothing is kept from the watches.
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

    /// Creates or replaces an object. One that would not change keeps its revision, and no watch hears of it.
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

    /// What the server itself writes into metadata: taken over from the object that is there, else made.
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

    /// Redelivers an object: a new revision, nothing else changed.
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

    /// What is selected at revision `at` (or the current one), from behind `after`, at most `limit`.
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

    /// Begins a watch: what it has to catch up with is already in the channel. Also returns the revision from which
    /// on it is told of changes.
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
        // The receiver is at hand: sending cannot fail.
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

    /// How many watches of the resource are open.
    pub(super) fn open_watches(&mut self, resource: Resource) -> usize {
        let watches = &mut self.table(resource).watches;
        watches.retain(|watch| !watch.items.is_closed());
        watches.len()
    }

    /// Sends something to every watch.
    pub(super) fn tell_watches(&mut self, item: &Item) {
        for table in self.tables.values_mut() {
            table.watches.retain(|watch| watch.items.send(item.clone()).is_ok());
        }
    }

    /// Has lists and watches of a resource tell of something that is no object: the watches once, each list that comes.
    pub(super) fn add_nonsense(&mut self, resource: Resource, object: &str) {
        self.table(resource).nonsense.push(object.to_owned());
        self.send_line(resource, &added(object));
    }

    /// Lists are free of nonsense again.
    pub(super) fn remove_nonsense(&mut self, resource: Resource) {
        self.table(resource).nonsense.clear();
    }

    /// Sends a line to every watch of a resource.
    pub(super) fn send_line(&mut self, resource: Resource, line: &str) {
        self.table(resource).watches.retain(|watch| watch.items.send(Item::Line(line.to_owned())).is_ok());
    }

    /// Ends every watch after what it has been sent.
    pub(super) fn end_watches(&mut self) {
        self.tables.values_mut().for_each(|table| table.watches.clear());
    }

    /// Sends a bookmark to every watch. It never claims what is being kept from them.
    pub(super) fn bookmark(&mut self) {
        let revision = self.revision;
        for table in self.tables.values_mut() {
            let delivered = table.delivered(revision);
            table.watches.retain(|w| w.items.send(Item::Bookmark(delivered.max(w.from))).is_ok());
        }
    }

    /// The revision that a bookmark may name.
    pub(super) fn delivered(&mut self, resource: Resource) -> u64 {
        let revision = self.revision;
        self.table(resource).delivered(revision)
    }

    /// Forgets the history: whatever revision a client has seen, it is too old.
    pub(super) fn compact(&mut self) {
        self.revision += 1;
        let revision = self.revision;
        // Every resource has a table: one that has never been asked for is compacted too.
        for resource in Resource::ALL {
            let table = self.table(resource);
            table.history.clear();
            table.compacted = revision;
        }
    }

    /// Keeps changes from the watches.
    pub(super) fn hold(&mut self, resource: Resource) {
        self.table(resource).held.get_or_insert_default();
    }

    /// Sends what was kept from the watches.
    pub(super) fn release(&mut self, resource: Resource) {
        let table = self.table(resource);
        for change in table.held.take().unwrap_or_default() {
            table.deliver(change);
        }
    }

    /// Sends the next `count` changes newest first, when they have all happened.
    pub(super) fn reorder(&mut self, resource: Resource, count: usize) {
        self.table(resource).reorder = count;
    }

    /// Sends each of the next `count` changes twice.
    pub(super) fn duplicate(&mut self, resource: Resource, count: usize) {
        self.table(resource).duplicate = count;
    }
}

/// The event of an object that is sent as it is.
fn added(object: &str) -> String {
    format!(r#"{{"type":"ADDED","object":{object}}}"#)
}
