//! Sweeps over the sockets of the host and its pods, beside the loop.
//!
//! Sweeps are spaced out, so that frequent changes of backends do not have every process of the host looked through
//! without a pause.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::abi::ServiceId;
use proxy_common::addr::Family;
use tokio::task::JoinHandle;

use crate::host::sockets::{SocketMaps, SocketSweeper};
use crate::observe::metrics::Metrics;
use crate::reconcile::shares::rest_after;
use crate::reconcile::stale::Serving;

/// Sweeps that are due, and the one that runs.
#[derive(Debug)]
pub(super) struct Sweeps {
    due: Due,
    state: State,
}

/// Work of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// Whether connected UDP sockets have to be led to where their Services lead now.
    pub(super) follow: bool,
    /// Whether it is time to look for leftovers of sockets in `STREAMS`.
    pub(super) streams: bool,
}

#[derive(Debug)]
enum State {
    /// No sweep runs, and none begins before this time.
    Resting(Instant),
    /// The task returns the CPU time that it took.
    Running { since: Instant, task: JoinHandle<Duration> },
}

impl Sweeps {
    /// Makes the state with nothing due, in which a sweep may begin from `now` on.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: Due::default(), state: State::Resting(now) }
    }

    /// Adds work for the next sweep.
    pub(super) fn add(&mut self, due: Due) {
        self.due.follow |= due.follow;
        self.due.streams |= due.streams;
    }

    /// Returns the time from which the next sweep may begin, if one is due and none runs.
    fn begins_at(&self) -> Option<Instant> {
        match self.state {
            State::Resting(until) if self.due != Due::default() => Some(until),
            State::Resting(_) | State::Running { .. } => None,
        }
    }

    /// Begins the sweep that is due by `spawn`, if it may begin at `now`. If there is nothing to spawn, nothing is due
    /// any more.
    pub(super) fn begin(&mut self, now: Instant, spawn: impl FnOnce(Due) -> Option<JoinHandle<Duration>>) {
        if self.begins_at().is_none_or(|time| now < time) {
            return;
        }
        if let Some(task) = spawn(std::mem::take(&mut self.due)) {
            self.state = State::Running { since: now, task };
        }
    }

    /// Waits until the running sweep has ended, or until the time at which the next one may begin. Never returns while
    /// there is neither.
    pub(super) async fn changed(&mut self) {
        if let State::Running { since, task } = &mut self.state {
            // A panic in the sweep has been printed; the next sweep is a new task.
            let cpu = task.await.unwrap_or_default();
            self.state = State::Resting(rests_until(*since, cpu));
        } else if let Some(time) = self.begins_at() {
            tokio::time::sleep_until(time.into()).await;
        } else {
            std::future::pending().await
        }
    }
}

/// Returns the time before which no sweep begins, after one that began at `since` and took this CPU time. (On a busy
/// host a sweep takes long, and has cost little.)
fn rests_until(since: Instant, cpu: Duration) -> Instant {
    since + rest_after(cpu)
}

/// A sweep with all that it needs, to run on any thread.
pub(super) struct Sweep {
    pub(super) sweeper: Arc<SocketSweeper>,
    pub(super) sockets: Arc<SocketMaps>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) families: Vec<Family>,
    /// State of the Services to which connected UDP sockets are led, if they are.
    pub(super) serving: Option<Serving>,
    /// Pods that opt out.
    pub(super) opted_out: BTreeSet<Arc<str>>,
    /// Ids of SCTP Services, if leftovers in `STREAMS` are freed. sock_diag lists SCTP sockets only by a module of its
    /// own, so records of these Services are left alone.
    pub(super) sctp: Option<BTreeSet<ServiceId>>,
}

impl Sweep {
    /// Leads connected UDP sockets to where their Services lead now, and frees what closed sockets have left in
    /// `STREAMS`. Returns the CPU time that this took.
    pub(super) fn run(self) -> Duration {
        let following = self.serving.as_ref().map(|serving| self.follow(serving));
        let freeing = self.sctp.as_ref().map(|sctp| self.free_streams(sctp));
        following.unwrap_or_default() + freeing.unwrap_or_default()
    }

    fn follow(&self, serving: &Serving) -> Duration {
        let start = Instant::now();
        match self.sweeper.follow(&self.sockets, |socket| serving.order(socket), &self.opted_out) {
            Ok(report) => {
                self.metrics.swept(&self.families, start.elapsed(), &report);
                if report.led + report.destroyed > 0 {
                    tracing::info!(
                        led = report.led,
                        destroyed = report.destroyed,
                        "led sockets of UDP to where their Services lead now, and destroyed those that could not be"
                    );
                }
                for error in &report.errors {
                    tracing::warn!(%error, "following UDP Services with their sockets");
                }
                tracing::debug!(?report, "UDP sockets looked at");
                report.cpu
            }
            Err(error) => {
                tracing::warn!(%error, "UDP sockets could not be looked at");
                Duration::ZERO
            }
        }
    }

    fn free_streams(&self, sctp: &BTreeSet<ServiceId>) -> Duration {
        match self.sweeper.free_streams(&self.sockets, |record| !sctp.contains(&record.service)) {
            Ok((freed, cpu)) => {
                self.metrics.streams_freed(freed);
                tracing::debug!(freed, "looked for what closed sockets have left in STREAMS");
                cpu
            }
            Err(error) => {
                tracing::warn!(%error, "what closed sockets have left in STREAMS cannot be freed");
                Duration::ZERO
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOW: Due = Due { follow: true, streams: false };
    const STREAMS: Due = Due { follow: false, streams: true };

    fn running(took: Duration) -> JoinHandle<Duration> {
        tokio::spawn(async move { took })
    }

    #[tokio::test]
    async fn a_sweep_does_all_that_is_due_and_the_next_one_rests_from_its_begin() {
        let start = Instant::now();
        let mut sweeps = Sweeps::new(start);
        assert_eq!(sweeps.begins_at(), None, "nothing is due");
        sweeps.add(FOLLOW);
        sweeps.add(STREAMS);
        sweeps.add(Due::default());
        assert_eq!(sweeps.begins_at(), Some(start));
        sweeps.begin(start, |due| {
            assert_eq!(due, Due { follow: true, streams: true });
            Some(running(Duration::from_secs(2)))
        });
        // More comes while the sweep runs: it waits, and what has begun is not due any more.
        sweeps.add(FOLLOW);
        assert_eq!(sweeps.begins_at(), None, "one runs");
        sweeps.begin(start, |_| panic!("beside another one"));
        sweeps.changed().await;
        let rested = start + Duration::from_secs(18);
        assert_eq!(sweeps.begins_at(), Some(rested));
        sweeps.begin(rested - Duration::from_millis(1), |_| panic!("without a rest"));
        sweeps.begin(rested, |due| {
            assert_eq!(due, FOLLOW);
            Some(running(Duration::ZERO))
        });
        sweeps.changed().await;
        sweeps.add(STREAMS);
        assert_eq!(sweeps.begins_at(), Some(rested + Duration::from_secs(1)), "the shortest rest");
    }

    #[tokio::test]
    async fn a_sweep_that_cannot_begin_is_not_due_and_a_panic_costs_nothing() {
        let start = Instant::now();
        let mut sweeps = Sweeps::new(start);
        sweeps.add(FOLLOW);
        sweeps.begin(start, |_| None);
        assert_eq!(sweeps.begins_at(), None);
        sweeps.add(FOLLOW);
        sweeps.begin(start, |_| Some(tokio::spawn(std::future::pending())));
        let State::Running { task, .. } = &sweeps.state else { panic!("none runs") };
        task.abort();
        sweeps.changed().await;
        sweeps.add(STREAMS);
        assert_eq!(sweeps.begins_at(), Some(start + Duration::from_secs(1)));
    }
}
