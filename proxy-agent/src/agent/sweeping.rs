//! Sweeps over the sockets of the host and its pods, beside the loop.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::abi::proto;

use super::Agent;
use super::programmed::Programmed;
use crate::host::cgroups::Place;
use crate::host::sockets::{SocketMaps, SocketSweeper};
use crate::observe::metrics::Metrics;
use crate::reconcile::shares::rest_after;
use crate::reconcile::stale::Serving;

impl Agent {
    /// Ends a sweep that took this CPU time, and sets the time of the next one. (On a busy host a sweep takes long, and
    /// has cost little.)
    pub(super) fn end_sweep(&mut self, cpu: Duration) {
        self.sweep = None;
        self.sweep_at = self.swept_since + rest_after(cpu);
    }

    /// Begins the sweeps that are due: leads connected UDP sockets to where their Services lead now, and frees what
    /// closed sockets have left in `STREAMS`. Sweeps are spaced out, so that frequent changes of backends do not have
    /// every process of the host looked through without a pause.
    pub(super) fn begin_sweep(&mut self) {
        let due = self.sweep_again || self.streams_due;
        if !due || self.sweep.is_some() || Instant::now() < self.sweep_at {
            return;
        }
        let Some(Programmed { model, sweeper: Some((sweeper, sockets)), .. }) = &self.programmed else {
            (self.sweep_again, self.streams_due) = (false, false);
            return;
        };
        self.swept_since = Instant::now();
        let (sweeper, sockets) = (Arc::clone(sweeper), Arc::clone(sockets));
        let (metrics, families) = (Arc::clone(&self.metrics), self.config.families.clone());
        let serving = self.sweep_again.then(|| Serving::of(model));
        // sock_diag lists SCTP sockets only by a module of its own, so records of SCTP Services are left alone.
        let sctp = model.ports.iter().filter(|(key, _)| key.proto == proto::SCTP).map(|(_, port)| port.id);
        let sctp: Option<BTreeSet<u32>> = self.streams_due.then(|| sctp.collect());
        (self.sweep_again, self.streams_due) = (false, false);
        let in_force = |cgroup| self.opted_out.as_ref().is_some_and(|cgroups| cgroups.contains(cgroup));
        let pods = self
            .found
            .iter()
            .flat_map(|found| &found.pods)
            .filter(|(_, place)| matches!(place, Place::Cgroup(cgroup) if in_force(cgroup)));
        let opted_out = pods.map(|(uid, _)| Arc::clone(uid)).collect();
        self.sweep = Some(tokio::task::spawn_blocking(move || {
            let mut cpu = Duration::ZERO;
            if let Some(serving) = serving {
                let start = Instant::now();
                match sweeper.follow(&sockets, |socket| serving.order(socket), &opted_out) {
                    Ok(report) => {
                        cpu += report.cpu;
                        metrics.swept(&families, start.elapsed(), &report);
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
                    }
                    Err(error) => tracing::warn!(%error, "UDP sockets could not be looked at"),
                }
            }
            if let Some(sctp) = sctp {
                cpu += free_streams(&sweeper, &sockets, &metrics, &sctp);
            }
            cpu
        }));
    }
}

/// Frees what closed sockets have left in `STREAMS`. Returns the CPU time that this took.
fn free_streams(
    sweeper: &SocketSweeper,
    sockets: &SocketMaps,
    metrics: &Metrics,
    sctp: &BTreeSet<u32>,
) -> Duration {
    match sweeper.free_streams(sockets, |record| !sctp.contains(&record.service)) {
        Ok((freed, cpu)) => {
            metrics.streams_freed(freed);
            tracing::debug!(freed, "looked for what closed sockets have left in STREAMS");
            cpu
        }
        Err(error) => {
            tracing::warn!(%error, "what closed sockets have left in STREAMS cannot be freed");
            Duration::ZERO
        }
    }
}
