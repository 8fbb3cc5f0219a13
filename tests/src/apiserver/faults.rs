//! What a test can have the server do wrong.
//!
//! Every method has taken effect when it returns.

use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::Value;

use super::object::Key;
use super::resource::{Resource, Verb};
use super::server::Command;
use super::status::Status;
use super::store::Item;
use super::{ApiServer, Shared};

/// How a watch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As when its time is up: the response is complete.
    Clean,
    /// The connection breaks; the response stays incomplete.
    Broken,
    /// Each open watch breaks in the middle of the next event it is to deliver, inside an HTTP chunk.
    WithinNextEvent,
}

/// What becomes of a list that is asked for as the beginning of a watch (`sendInitialEvents`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// It is served, as since Kubernetes 1.34.
    #[default]
    Offered,
    /// It is answered 422, as by a server that knows the parameter and has the feature switched off.
    Refused,
    /// The parameters are ignored, as by a server that has never heard of them: the watch begins with the state, and
    /// its end is not marked.
    Ignored,
    /// It is never answered, as by something in between that waits for the end of a response.
    Stuck,
}

/// Faults that requests ask about.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) streams: Streams,
    failures: Vec<Failure>,
    pub(super) latency: Duration,
    pub(super) expired_as_http: bool,
    pub(super) short_watches: bool,
}

#[derive(Debug)]
struct Failure {
    verb: Option<Verb>,
    resource: Option<Resource>,
    status: u16,
    /// Seconds, for `Retry-After`.
    retry_after: Option<u32>,
    remaining: usize,
}

impl Faults {
    /// The failure that this request has to meet.
    pub(super) fn take_failure(&mut self, verb: Verb, resource: Resource) -> Option<Status> {
        let index = self.failures.iter().position(|failure| {
            failure.verb.is_none_or(|v| v == verb) && failure.resource.is_none_or(|r| r == resource)
        })?;
        let failure = self.failures.get_mut(index)?;
        let status = Status::new(failure.status, "the test asked for this failure");
        let status = match failure.retry_after {
            Some(seconds) => status.with_retry_after(seconds),
            None => status,
        };
        failure.remaining -= 1;
        if failure.remaining == 0 {
            self.failures.remove(index);
        }
        Some(status)
    }
}

/// A list that waits until it is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Gate {
    pub(super) resource: Resource,
    /// The pages behind the first one, not the first.
    pub(super) further_pages: bool,
}

impl Shared {
    /// Waits until the list may be answered.
    pub(super) async fn pass(&self, gate: Gate) {
        // It fails only without a sender, and the sender is `self`.
        let mut gates = self.gates.subscribe();
        let _passed = gates.wait_for(|gates| !gates.contains(&gate)).await;
    }
}

impl ApiServer {
    /// Ends the watches that are open.
    pub fn cut_watches(&self, cut: Cut) {
        let mut state = self.shared.state();
        match cut {
            Cut::Clean => state.store.end_watches(),
            Cut::Broken => {
                state.store.tell_watches(&Item::Abort);
                state.store.end_watches();
            }
            Cut::WithinNextEvent => state.store.tell_watches(&Item::CutNextEvent),
        }
    }

    /// Breaks every connection, whatever it is doing.
    pub fn cut_connections(&self) {
        self.order(Command::CutConnections);
    }

    /// Goes away: connections break, new ones are refused. The objects stay, and the socket stays bound, so
    /// that nobody who asks for some free port is given this one.
    pub fn go_away(&self) {
        self.order(|done| Command::Away(None, done));
    }

    /// [`Self::go_away`] for a time; returns at once.
    pub fn go_away_for(&self, time: Duration) {
        self.order(|done| Command::Away(Some(time), done));
    }

    /// Comes back on the same port.
    pub fn come_back(&self) {
        self.order(Command::Back);
    }

    fn order(&self, command: impl FnOnce(mpsc::Sender<()>) -> Command) {
        let (done, wait) = mpsc::channel();
        if self.commands.send(command(done)).is_ok() {
            let _stopped = wait.recv();
        }
    }

    /// Answers the next `count` requests of a verb and a resource (`None`: any) with an HTTP status. A client with
    /// retries of its own uses several up.
    pub fn fail(&self, verb: Option<Verb>, resource: Option<Resource>, status: u16, count: usize) {
        self.push_failure(Failure { verb, resource, status, retry_after: None, remaining: count });
    }

    /// Answers the next `count` requests with an HTTP status that asks clients to stay away for some seconds.
    pub fn fail_and_ask_for(&self, retry_after: u32, status: u16, count: usize) {
        let retry_after = Some(retry_after);
        self.push_failure(Failure { verb: None, resource: None, status, retry_after, remaining: count });
    }

    fn push_failure(&self, failure: Failure) {
        if failure.remaining > 0 {
            self.shared.state().faults.failures.push(failure);
        }
    }

    /// Fails no more requests.
    pub fn stop_failing(&self) {
        self.shared.state().faults.failures.clear();
    }

    /// Lets every request wait that long.
    pub fn delay_requests(&self, latency: Duration) {
        self.shared.state().faults.latency = latency;
    }

    /// Lets lists of a resource (and watches that begin with the state) wait for [`Self::release_list`].
    pub fn hold_list(&self, resource: Resource) {
        self.gate(Gate { resource, further_pages: false });
    }

    /// Serves the first page of a list, and lets the further ones wait for [`Self::release_list`]. Of a list that is
    /// streamed, the first half or [`STREAM_BEGINNING`](super::STREAM_BEGINNING) objects are served.
    pub fn hold_further_pages(&self, resource: Resource) {
        self.gate(Gate { resource, further_pages: true });
    }

    fn gate(&self, gate: Gate) {
        self.shared.gates.send_modify(|gates| {
            gates.insert(gate);
        });
    }

    /// Answers the lists of a resource again, those that wait included.
    pub fn release_list(&self, resource: Resource) {
        self.shared.gates.send_modify(|gates| gates.retain(|gate| gate.resource != resource));
    }

    /// Says whether lists are streamed from here on; those that are being streamed go on.
    pub fn offer_streams(&self, streams: Streams) {
        self.shared.state().faults.streams = streams;
    }

    /// Forgets the history: whatever resourceVersion or continue token a client has, it is expired.
    pub fn compact(&self) {
        self.shared.state().store.compact();
    }

    /// Whether a watch that begins too far back is answered 410, instead of an ERROR event in a 200 response as
    /// kube-apiserver does it.
    pub fn expire_watches_by_http(&self, by_http: bool) {
        self.shared.state().faults.expired_as_http = by_http;
    }

    /// Sends an ERROR event with that code to every watch, and ends it: 410 is what a watch gets that the server
    /// cannot keep up to date.
    pub fn fail_watches(&self, code: u16) {
        let mut state = self.shared.state();
        state.store.tell_watches(&Item::Error(Status::new(code, "the test asked for this error")));
        state.store.end_watches();
    }

    /// Has every list of a resource hold something that is no such object, and tells open watches of it. It has to be
    /// JSON, in one line.
    pub fn add_nonsense(&self, resource: Resource, object: &str) {
        self.shared.state().store.add_nonsense(resource, object);
    }

    /// Ends what [`Self::add_nonsense`] began.
    pub fn remove_nonsense(&self, resource: Resource) {
        self.shared.state().store.remove_nonsense(resource);
    }

    /// Sends a line, whatever it is, to every watch of a resource.
    pub fn send_line(&self, resource: Resource, line: &str) {
        self.shared.state().store.send_line(resource, line);
    }

    /// Whether watches that do not begin with a list end as soon as they are opened, as by something in between that
    /// cannot carry them.
    pub fn end_watches_at_once(&self, at_once: bool) {
        self.shared.state().faults.short_watches = at_once;
    }

    /// Sends a bookmark to every watch that wants them.
    pub fn send_bookmarks(&self) {
        self.shared.state().store.bookmark();
    }

    /// Keeps the changes of a resource from the watches until [`Self::release_events`]; lists do show them.
    pub fn hold_events(&self, resource: Resource) {
        self.shared.state().store.hold(resource);
    }

    /// Delivers what [`Self::hold_events`] kept.
    pub fn release_events(&self, resource: Resource) {
        self.shared.state().store.release(resource);
    }

    /// Delivers each of the next `count` changes of a resource twice.
    pub fn duplicate_events(&self, resource: Resource, count: usize) {
        self.shared.state().store.duplicate(resource, count);
    }

    /// Delivers the next `count` changes of a resource newest first, when all of them have happened.
    pub fn reorder_events(&self, resource: Resource, count: usize) {
        self.shared.state().store.reorder(resource, count);
    }

    /// [`Self::apply`] of which no watch ever hears: only a list shows it.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_silently(&self, object: Value) -> Result<u64> {
        let resource = Resource::of(&object)?;
        let put = self.shared.state().store.put(resource, object, false);
        Ok(put.map_err(|problem| anyhow!(problem))?.revision)
    }

    /// Deletes an object without an event: only a list shows it. Says whether it was there.
    pub fn delete_silently(&self, resource: Resource, namespace: &str, name: &str) -> bool {
        self.shared.state().store.delete(resource, &Key::new(namespace, name), false).is_some()
    }

    /// Delivers an object as modified though nothing but its revision changes; says whether it was there.
    ///
    /// # Errors
    /// None that a stored object can cause.
    pub fn touch(&self, resource: Resource, namespace: &str, name: &str) -> Result<bool> {
        let touched = self.shared.state().store.touch(resource, &Key::new(namespace, name));
        touched.map_err(|problem| anyhow!(problem))
    }
}
