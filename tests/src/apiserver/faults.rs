//! Faults that a test can inject into the server.
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

/// Way in which a watch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As at the end of its time: the response is complete.
    Clean,
    /// The connection breaks; the response stays incomplete.
    Broken,
    /// Each open watch breaks in the middle of the next event it is to deliver, inside an HTTP chunk.
    WithinNextEvent,
}

/// Treatment of a list that is requested as the beginning of a watch (`sendInitialEvents`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streams {
    /// The request is served, as since Kubernetes 1.34.
    #[default]
    Offered,
    /// The request is answered with 422, as by a server that knows the parameter and has the feature switched off.
    Refused,
    /// The parameters are ignored, as by a server that does not know them: the watch begins with the state, and no
    /// bookmark marks the end of the state.
    Ignored,
    /// The request is never answered, as by a proxy that waits for the end of a response.
    Stuck,
}

/// Faults that are checked for each request.
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
    /// Returns the failure that this request has to get, if any, and counts it.
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

/// A list that is held until the test releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Gate {
    pub(super) resource: Resource,
    /// Whether all pages but the first are held, instead of the first.
    pub(super) further_pages: bool,
}

impl Shared {
    /// Waits until the list may be answered.
    pub(super) async fn pass(&self, gate: Gate) {
        // The wait fails only without a sender, and the sender is in `self`.
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

    /// Goes away: connections break, new ones are refused. The objects stay. The socket stays bound, so that the kernel
    /// gives its port to no one else.
    pub fn go_away(&self) {
        self.order(|done| Command::Away(None, done));
    }

    /// Does [`Self::go_away`] for a time, then comes back; returns at once.
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

    /// Answers the next `count` requests of a verb and a resource (`None`: any) with an HTTP status. A client that
    /// retries by itself uses up several of them.
    pub fn fail(&self, verb: Option<Verb>, resource: Option<Resource>, status: u16, count: usize) {
        self.push_failure(Failure { verb, resource, status, retry_after: None, remaining: count });
    }

    /// Answers the next `count` requests with an HTTP status and a `Retry-After` of some seconds.
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

    /// Delays every request by `latency`.
    pub fn delay_requests(&self, latency: Duration) {
        self.shared.state().faults.latency = latency;
    }

    /// Holds lists of a resource (and watches that begin with the state) until [`Self::release_list`].
    pub fn hold_list(&self, resource: Resource) {
        self.gate(Gate { resource, further_pages: false });
    }

    /// Serves the first page of a list, and holds the further ones until [`Self::release_list`]. Of a list that is
    /// streamed, the first half or [`STREAM_BEGINNING`](super::STREAM_BEGINNING) objects are served.
    pub fn hold_further_pages(&self, resource: Resource) {
        self.gate(Gate { resource, further_pages: true });
    }

    fn gate(&self, gate: Gate) {
        self.shared.gates.send_modify(|gates| {
            gates.insert(gate);
        });
    }

    /// Answers the lists of a resource again, including those that are held.
    pub fn release_list(&self, resource: Resource) {
        self.shared.gates.send_modify(|gates| gates.retain(|gate| gate.resource != resource));
    }

    /// Sets whether lists are streamed from now on; streams in progress continue.
    pub fn offer_streams(&self, streams: Streams) {
        self.shared.state().faults.streams = streams;
    }

    /// Forgets the history: every resourceVersion and continue token that a client has is then expired.
    pub fn compact(&self) {
        self.shared.state().store.compact();
    }

    /// Sets whether a watch that begins too far back is answered with 410, instead of kube-apiserver's ERROR event in a
    /// 200 response.
    pub fn expire_watches_by_http(&self, by_http: bool) {
        self.shared.state().faults.expired_as_http = by_http;
    }

    /// Sends an ERROR event with that code to every watch, and ends it: 410 is the code for a watch that the server
    /// cannot keep up to date.
    pub fn fail_watches(&self, code: u16) {
        let mut state = self.shared.state();
        state.store.tell_watches(&Item::Error(Status::new(code, "the test asked for this error")));
        state.store.end_watches();
    }

    /// Adds to every list of a resource an item that is no such object, and sends it to open watches. It has to be
    /// JSON, in one line.
    pub fn add_nonsense(&self, resource: Resource, object: &str) {
        self.shared.state().store.add_nonsense(resource, object);
    }

    /// Removes the items of [`Self::add_nonsense`].
    pub fn remove_nonsense(&self, resource: Resource) {
        self.shared.state().store.remove_nonsense(resource);
    }

    /// Sends a line, not checked for validity, to every watch of a resource.
    pub fn send_line(&self, resource: Resource, line: &str) {
        self.shared.state().store.send_line(resource, line);
    }

    /// Sets whether watches that do not begin with a list end as soon as they are opened, as behind a proxy that cannot
    /// carry them.
    pub fn end_watches_at_once(&self, at_once: bool) {
        self.shared.state().faults.short_watches = at_once;
    }

    /// Sends a bookmark to every watch that wants them.
    pub fn send_bookmarks(&self) {
        self.shared.state().store.bookmark();
    }

    /// Holds back the changes of a resource from the watches until [`Self::release_events`]; lists do show them.
    pub fn hold_events(&self, resource: Resource) {
        self.shared.state().store.hold(resource);
    }

    /// Delivers the changes that [`Self::hold_events`] held back.
    pub fn release_events(&self, resource: Resource) {
        self.shared.state().store.release(resource);
    }

    /// Delivers each of the next `count` changes of a resource twice.
    pub fn duplicate_events(&self, resource: Resource, count: usize) {
        self.shared.state().store.duplicate(resource, count);
    }

    /// Delivers the next `count` changes of a resource newest first, once all of them have happened.
    pub fn reorder_events(&self, resource: Resource, count: usize) {
        self.shared.state().store.reorder(resource, count);
    }

    /// Does [`Self::apply`] without an event: only a list shows the object.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_silently(&self, object: Value) -> Result<u64> {
        let resource = Resource::of(&object)?;
        let put = self.shared.state().store.put(resource, object, false);
        Ok(put.map_err(|problem| anyhow!(problem))?.revision)
    }

    /// Deletes an object without an event: only a list shows it. Returns whether the object existed.
    pub fn delete_silently(&self, resource: Resource, namespace: &str, name: &str) -> bool {
        self.shared.state().store.delete(resource, &Key::new(namespace, name), false).is_some()
    }

    /// Delivers an object as modified although only its revision changes; returns whether the object existed.
    ///
    /// # Errors
    /// A stored object causes none.
    pub fn touch(&self, resource: Resource, namespace: &str, name: &str) -> Result<bool> {
        let touched = self.shared.state().store.touch(resource, &Key::new(namespace, name));
        touched.map_err(|problem| anyhow!(problem))
    }
}
