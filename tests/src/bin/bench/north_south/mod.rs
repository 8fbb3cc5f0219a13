//! `north-south`: a client outside the cluster through a nodePort, compared with the same client to the pod's own
//! address without a proxy.
//!
//! Each side has a set of namespaces of its own. In one the agent serves the first node; in the next two nothing
//! translates; in another, two programs rewrite only the packets of the benchmark; and in the last, if `nft` is
//! installed, an nftables ruleset translates. Packets take the same path in all of them. The second set without a proxy
//! shows the machine's noise; [`floor`] shows the cost of any translation of packets on it.

mod floor;
mod nft;
mod sides;

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use clap::Args;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::Counter;

use crate::cluster::Cluster;
use crate::outside::Backend;
use crate::progress;
use crate::report::{Bar, Figure, Report};
use crate::stats::Estimate;
use crate::traffic::{Job, Listener, Pair, Rounds, Workload, share};
use floor::Floor;
use nft::Nft;
use sides::{Grounds, Side};

/// Bar for connections per second in the largest world over those in the smallest, both as ratios to no proxy.
const FLAT: Bar = Bar::AtLeast(0.98);
/// Workloads that are measured by default. A server that closes first remembers the connection for a minute, and in
/// most cases refuses another one from the same address and port. Without a proxy, the ports do not suffice for one
/// client as fast as this one.
const USUAL: [Workload; 3] = [Workload::TcpRr, Workload::TcpStream, Workload::TcpCrrClient];

/// Options of `north-south`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Numbers of Services in the cluster. Every workload runs with the first number; workloads that open connections
    /// run with each number.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1000, 10_000])]
    services: Vec<usize>,
    /// Workloads to run [default: tcp-rr, tcp-stream, tcp-crr-client].
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Nodes of the pod [default: both].
    #[arg(long, value_enum, value_delimiter = ',')]
    backends: Vec<Backend>,
    /// Rounds of each workload and side.
    #[arg(long, default_value_t = 120)]
    rounds: usize,
    /// Blocks, each with fresh processes, that the rounds are divided into: the memory of a process can be lucky or
    /// unlucky.
    #[arg(long, default_value_t = 6)]
    blocks: usize,
    /// Length of a round in milliseconds.
    #[arg(long, default_value_t = 50)]
    round_ms: u64,
    /// CPU of the client and CPU of the server. On one CPU only the work itself takes time; on two, waking the other
    /// one adds to it.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1])]
    cpus: Vec<usize>,
    /// Use IPv6 instead of IPv4; without nftables and the programs that only rewrite.
    #[arg(long)]
    ipv6: bool,
    /// Leave out the second set without a proxy.
    #[arg(long)]
    no_control: bool,
    /// Leave out the programs that only rewrite.
    #[arg(long)]
    no_floor: bool,
    /// Leave out nftables, even if `nft` is installed.
    #[arg(long)]
    no_nftables: bool,
}

impl Options {
    fn backends(&self) -> Vec<Backend> {
        if self.backends.is_empty() { Backend::ALL.to_vec() } else { self.backends.clone() }
    }

    /// Workloads for one number of Services: all of them, or only those that open connections.
    fn workloads(&self, all: bool) -> Vec<Workload> {
        let asked = if self.only.is_empty() { USUAL.to_vec() } else { self.only.clone() };
        Workload::ALL
            .into_iter()
            .filter(|workload| asked.contains(workload) && (all || workload.connects()))
            .collect()
    }
}

/// Runs the benchmark.
///
/// # Errors
/// If a lab cannot be built, the agent does not start, or a connection fails.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("north-south", format!("{options:?}"));
    let nft = match Nft::find() {
        _ if options.no_nftables || options.ipv6 => None,
        Some(nft) => Some(nft),
        None => {
            report.notes.push("nftables was not measured: there is no `nft` (package nftables)".to_owned());
            None
        }
    };
    let mut sides = vec![Side::Vipr, Side::Plain];
    sides.extend((!options.no_control).then_some(Side::Control));
    sides.extend(nft.is_some().then_some(Side::Nftables));
    let floored = !options.no_floor && !options.ipv6;
    sides.extend(floored.then_some(Side::Floor));
    let grounds = Grounds::new(&sides, options)?;
    let mut floor = floored.then(|| Floor::new(grounds.of(Side::Floor))).transpose()?;
    let node = grounds.of(Side::Vipr).node();
    let mut cluster = Cluster::start(node)?;
    for backend in Backend::ALL {
        cluster.apply(&grounds.of(Side::Vipr).service(backend, options.ipv6)?)?;
    }

    let mut crr: BTreeMap<(Backend, Workload), Vec<(f64, String)>> = BTreeMap::new();
    for (index, &services) in options.services.iter().enumerate() {
        let (world, agent) = cluster.fill(services, node)?;
        if let Some(nft) = &nft {
            nft.load(grounds.of(Side::Nftables), world)?;
            progress(format_args!("{world}: nftables loaded"));
        }
        let world = world.to_string();
        for backend in options.backends() {
            let rounds = measure(&grounds, &sides, &mut floor, backend, options, index == 0)?;
            report.figures.extend(figures(&rounds, backend, &world));
            for workload in options.workloads(false) {
                let ratio = rounds.ratio(workload, Side::Vipr, Side::Plain);
                let ratio = ratio.map(|ratio| (ratio.median, world.clone()));
                crr.entry((backend, workload)).or_default().extend(ratio);
            }
        }
        let status = agent.get("/readyz")?.0;
        ensure!(status == 200, "the agent did not stay ready; its log:\n{}", agent.log());
    }
    for ((backend, workload), ratios) in &crr {
        if let [(first, _), .., (last, world)] = ratios.as_slice() {
            let name = format!("{} {}: against fewest Services", backend.name(), workload.name());
            let figure = Figure::new(name, world, "ratio", last / first).samples(ratios.len());
            report.figures.push(figure.bar(FLAT));
        }
    }
    report.machine.end();
    Ok(report)
}

fn measure(
    grounds: &Grounds,
    sides: &[Side],
    floor: &mut Option<Floor>,
    backend: Backend,
    options: &Options,
    all_workloads: bool,
) -> Result<Rounds<Side>> {
    let mut measured = Rounds::new();
    let blocks = options.blocks.max(1);
    for block in 0..blocks {
        let mut pairs: BTreeMap<Side, Pair> =
            sides.iter().map(|&side| Ok((side, grounds.start(side, backend)?))).collect::<Result<_>>()?;
        if block == 0 {
            prove(grounds, floor, backend, &mut pairs)?;
        }
        for workload in options.workloads(all_workloads) {
            let targets = grounds.targets(sides, backend, workload.listener())?;
            if let Some(floor) = floor {
                floor.aim(grounds.of(Side::Floor), backend, workload.listener())?;
            }
            let rounds = share(options.rounds, blocks, block);
            measured.run(&mut pairs, workload, |side| targets[&side], options.round_ms, rounds)?;
        }
        progress(format_args!("{}: block {} of {blocks}", backend.name(), block + 1));
    }
    Ok(measured)
}

/// Proves that one side goes through the programs and the others do not.
fn prove(
    grounds: &Grounds,
    floor: &mut Option<Floor>,
    backend: Backend,
    pairs: &mut BTreeMap<Side, Pair>,
) -> Result<()> {
    if let Some(floor) = floor {
        floor.aim(grounds.of(Side::Floor), backend, Listener::AnswerAndWait)?;
    }
    let maps = KernelMaps::open(&PinDir::new(grounds.of(Side::Vipr).node().pin_dir()))?;
    let sides: Vec<Side> = pairs.keys().copied().collect();
    let targets = grounds.targets(&sides, backend, Listener::AnswerAndWait)?;
    for (side, pair) in pairs {
        let before = maps.counter(Counter::Flow)?;
        let server = targets[side];
        let workload = Workload::TcpCrrClient;
        pair.ask(&Job::Run { workload, server, warm_up_us: 0, measure_us: 1000 })?;
        let flows = maps.counter(Counter::Flow)? - before;
        ensure!((flows > 0) == (*side == Side::Vipr), "{side:?}: {flows} flows");
    }
    Ok(())
}

fn figures(rounds: &Rounds<Side>, backend: Backend, world: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    for workload in Workload::ALL {
        let Some(ratio) = rounds.ratio(workload, Side::Vipr, Side::Plain) else { continue };
        let name = format!("{} {}", backend.name(), workload.name());
        let control = rounds.ratio(workload, Side::Control, Side::Plain);
        let mut figure = figure(rounds, workload, Side::Vipr, &name, world, ratio).bar(bar(workload));
        if let Some(control) = control {
            figure = figure.detail("control ratio", control.median);
        }
        let lost = rounds.lost(workload);
        if lost > 0 {
            figure = figure.detail("lost datagrams", lost as f64);
        }
        figures.push(figure);
        for (side, what) in [(Side::Floor, "rewriting alone"), (Side::Nftables, "nftables")] {
            if let Some(ratio) = rounds.ratio(workload, side, Side::Plain) {
                let name = format!("{name}, {what}");
                figures.push(self::figure(rounds, workload, side, &name, world, ratio));
            }
        }
    }
    figures
}

fn figure(
    rounds: &Rounds<Side>,
    workload: Workload,
    side: Side,
    name: &str,
    world: &str,
    ratio: Estimate,
) -> Figure {
    let (scale, proxy, plain) = if workload == Workload::TcpStream {
        (8e-9, "proxy Gbit/s", "no proxy Gbit/s")
    } else {
        (1.0, "proxy /s", "no proxy /s")
    };
    Figure::estimated(name, world, "ratio", ratio)
        .detail(proxy, rounds.rate(workload, side) * scale)
        .detail(plain, rounds.rate(workload, Side::Plain) * scale)
}

fn bar(workload: Workload) -> Bar {
    Bar::AtLeast(match workload {
        Workload::TcpCrr | Workload::TcpCrrClient | Workload::TcpStream => 0.95,
        Workload::TcpRr | Workload::UdpRr | Workload::UdpUnconnectedRr => 0.97,
    })
}
