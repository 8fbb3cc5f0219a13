//! Rounds of the workloads, and of single system calls.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::Options;
use super::sides::{Ground, Side};
use crate::report::{Bar, Figure};
use crate::stats::{Estimate, median_of, percentile};
use crate::traffic::{Answer, Call, Job, Pair, Rounds, Workload};

/// Everything that was measured in one world.
pub(super) struct Measurements {
    rounds: Rounds<Side>,
    calls: BTreeMap<Call, Calls>,
}

/// Durations in nanoseconds: medians by round, then all durations.
#[derive(Default)]
struct Calls {
    rounds: Vec<BTreeMap<Target, f64>>,
    all: BTreeMap<Target, Vec<u32>>,
}

/// Target of a single call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// The clusterIP, called from a cgroup with the programs.
    Vip,
    /// The pod, called from a cgroup with the programs: an address of no Service.
    NotOurs,
    /// The pod, called from a cgroup without programs.
    Plain,
    Control,
}

impl Target {
    const ALL: [Self; 4] = [Self::Vip, Self::NotOurs, Self::Plain, Self::Control];

    fn side(self) -> Side {
        match self {
            Self::Vip | Self::NotOurs => Side::Vipr,
            Self::Plain => Side::Plain,
            Self::Control => Side::Control,
        }
    }
}

impl Measurements {
    /// Returns an empty set of measurements.
    pub(super) fn new() -> Self {
        Self { rounds: Rounds::new(), calls: BTreeMap::new() }
    }

    /// Runs `rounds` rounds of a workload.
    pub(super) fn run(
        &mut self,
        ground: &Ground,
        pairs: &mut BTreeMap<Side, Pair>,
        workload: Workload,
        options: &Options,
        rounds: usize,
    ) -> Result<()> {
        let target = |side| ground.target(side, workload.listener());
        self.rounds.run(pairs, workload, target, options.round_ms, rounds)
    }

    /// Times single calls, `rounds` times `options.calls` to each kind of target.
    pub(super) fn time(
        &mut self,
        ground: &Ground,
        pairs: &mut BTreeMap<Side, Pair>,
        call: Call,
        options: &Options,
        rounds: usize,
    ) -> Result<()> {
        let calls = self.calls.entry(call).or_default();
        let mut order = Target::ALL;
        for round in 0..rounds {
            // Over the rounds, every order of neighbours occurs.
            order.rotate_left(1);
            order.swap(0, 1 + round % 3);
            let mut medians = BTreeMap::new();
            for target in order {
                let Some(pair) = pairs.get_mut(&target.side()) else { continue };
                let server = match target {
                    Target::NotOurs => ground.pod(target.side(), call.listener()),
                    Target::Vip | Target::Plain | Target::Control => {
                        ground.target(target.side(), call.listener())
                    }
                };
                let job = Job::Time { call, server, calls: options.calls };
                let Answer::Timed { nanos } = pair.ask(&job)? else { bail!("not an answer to {job:?}") };
                // The first tenth is left out: the caches are still filled by others.
                let warm = nanos.get(nanos.len() / 10..).unwrap_or_default();
                medians.insert(target, median_of(warm.iter().map(|ns| f64::from(*ns))));
                calls.all.entry(target).or_default().extend(warm);
            }
            calls.rounds.push(medians);
        }
        Ok(())
    }

    /// Returns the ratio of a workload's rates, round by round.
    pub(super) fn ratio(&self, workload: Workload) -> Option<Estimate> {
        self.rounds.ratio(workload, Side::Vipr, Side::Plain)
    }

    /// Returns the figures to report, for the world called `world`.
    pub(super) fn figures(&self, world: &str) -> Vec<Figure> {
        let mut figures = Vec::new();
        for workload in Workload::ALL {
            let Some(ratio) = self.ratio(workload) else { continue };
            let (scale, vipr, plain) = if workload == Workload::TcpStream {
                (8e-9, "vipr Gbit/s", "no proxy Gbit/s")
            } else {
                (1.0, "vipr /s", "no proxy /s")
            };
            let mut figure = Figure::estimated(workload.name(), world, "ratio", ratio)
                .detail(vipr, self.rounds.rate(workload, Side::Vipr) * scale)
                .detail(plain, self.rounds.rate(workload, Side::Plain) * scale)
                .bar(bar(workload));
            if let Some(control) = self.rounds.ratio(workload, Side::Control, Side::Plain) {
                figure = figure.detail("control ratio", control.median);
            }
            let lost = self.rounds.lost(workload);
            if lost > 0 {
                figure = figure.detail("lost datagrams", lost as f64);
            }
            figures.push(figure);
        }
        for (call, calls) in &self.calls {
            figures.extend(calls.figures(*call, world));
        }
        figures
    }
}

impl Calls {
    fn figures(&self, call: Call, world: &str) -> [Figure; 2] {
        [(Target::Vip, ""), (Target::NotOurs, ", no Service")].map(|(target, suffix)| {
            let name = format!("{}{suffix}: added p50", call.name());
            let mut figure = Figure::estimated(name, world, "ns", self.added(target))
                .detail("vipr p50", self.nanos(target, 0.5))
                .detail("vipr p99", self.nanos(target, 0.99))
                .detail("no proxy p50", self.nanos(Target::Plain, 0.5))
                .detail("no proxy p99", self.nanos(Target::Plain, 0.99));
            let control = self.added(Target::Control);
            if control.samples > 0 {
                figure = figure.detail("control added p50", control.median);
            }
            match call {
                Call::UdpConnect | Call::TcpConnect => figure.bar(Bar::AtMost(1000.0)),
                Call::FirstSend | Call::NextSend => figure,
            }
        })
    }

    fn added(&self, of: Target) -> Estimate {
        Estimate::of(
            self.rounds.iter().filter_map(|round| Some(round.get(&of)? - round.get(&Target::Plain)?)),
        )
    }

    fn nanos(&self, target: Target, p: f64) -> f64 {
        let all = self.all.get(&target).into_iter().flatten();
        percentile(all.map(|nanos| f64::from(*nanos)), p)
    }
}

fn bar(workload: Workload) -> Bar {
    Bar::AtLeast(match workload {
        Workload::TcpRr | Workload::TcpStream => 0.99,
        Workload::TcpCrr | Workload::TcpCrrClient => 0.97,
        Workload::UdpRr => 0.98,
        Workload::UdpUnconnectedRr => 0.93,
    })
}
