//! Vipr's own metrics; prefix `vipr_`. Metrics that are read from the kernel at each scrape are in [`super::scrape`].

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::labels::{Buckets, ByFate, ByMap, ByStage, EventFate, Stage, register};

/// The metrics.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) sync_failures: Counter,
    pub(super) programming: Labelled<ByStage, Histogram, Buckets>,
    pub(super) operations: Labelled<ByMap, Counter>,
    pub(super) drift: Labelled<ByMap, Counter>,
    pub(super) sockets_led: Counter,
    pub(super) sockets_destroyed: Counter,
    pub(super) streams_freed: Counter,
    pub(super) flows_collected: Counter,
    pub(super) problems: Gauge,
    pub(super) events: Labelled<ByFate, Counter>,
}

impl Own {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let [sockets_led, sockets_destroyed] = Self::sockets(registry);
        let metrics = Self {
            sync_failures: register(
                registry,
                "sync_failures",
                "Syncs that failed; each is followed by one of everything",
                Counter::default(),
            ),
            programming: register(
                registry,
                "programming_duration_seconds",
                "Time that changes spend between their arrival and the kernel maps: waiting for the sync, being planned, \
                 being written",
                Labelled::new_with_constructor(Buckets::Stage),
            ),
            operations: register(registry, "map_operations", "Operations on BPF maps", Labelled::default()),
            drift: register(
                registry,
                "drift",
                "Elements of BPF maps that somebody else had changed, and programs that somebody else had detached (`links`); they have been written anew and attached again",
                Labelled::default(),
            ),
            sockets_led,
            sockets_destroyed,
            streams_freed: register(
                registry,
                "streams_freed",
                "Elements of STREAMS that closed sockets had left behind, and that were freed",
                Counter::default(),
            ),
            flows_collected: register(
                registry,
                "flows_collected",
                "Expired flows of the packet edge whose memory was freed",
                Counter::default(),
            ),
            problems: register(
                registry,
                "problems",
                "Objects or files that cannot be used at present; `proxy-agent status` lists them",
                Gauge::default(),
            ),
            events: register(
                registry,
                "events",
                "Events for the Kubernetes API, by what became of them",
                Labelled::default(),
            ),
        };
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent that runs", version);
        metrics.begin_at_zero();
        metrics
    }

    /// Registers the counters of sweeps for connected UDP sockets: led, destroyed.
    fn sockets(registry: &mut Registry) -> [Counter; 2] {
        [
            (
                "sockets_led",
                "Connected UDP sockets that were connected to where their Service leads now",
            ),
            (
                "sockets_destroyed",
                "Connected UDP sockets that were ended because their backend had left and they could not be led to another one",
            ),
        ]
        .map(|(name, help)| register(registry, name, help, Counter::default()))
    }

    /// Makes all labels appear with zero: a rate needs the zero before the first count.
    fn begin_at_zero(&self) {
        for result in EventFate::ALL {
            drop(self.events.get_or_create(&ByFate { result }));
        }
        for stage in Stage::ALL {
            drop(self.programming.get_or_create(&ByStage { stage }));
        }
    }
}
