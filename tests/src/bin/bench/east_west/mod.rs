//! `east-west`: connections and datagrams from a pod through a clusterIP, against the same without a proxy.
//!
//! Two sets of processes do the same in the same pods. One is below the cgroup to which the agent has attached its
//! programs, and connects to the clusterIP. The other is in a cgroup beside it, where no program runs, and connects to
//! the pod's own address. A third set equals the second: its ratio to the second shows the machine's noise.

mod measure;
mod sides;

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use clap::Args;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::Counter;
use proxy_tests::lab::{Agent, Lab, LabSpec, Node};

use crate::cluster::Cluster;
use crate::progress;
use crate::report::{Bar, Figure, Report};
use crate::traffic::{Call, Job, Listener, Pair, Workload, share};
use measure::Measurements;
use sides::{Ground, Side};

/// Bar for connections per second in the largest world over those in the smallest, both as ratios to no proxy.
const FLAT: Bar = Bar::AtLeast(0.98);

/// Options of `east-west`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Numbers of Services in the cluster. Every workload runs with the first number; workloads that open connections
    /// run with each number.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1000, 10_000])]
    pub(crate) services: Vec<usize>,
    /// Workloads to run [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
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
    /// Calls of each kind in a round; 0 to time no single calls.
    #[arg(long, default_value_t = 500)]
    calls: u32,
    /// CPU of the client and CPU of the server. On one CPU only the work itself takes time; on two, waking the other
    /// one adds to it.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1])]
    pub(crate) cpus: Vec<usize>,
    /// Put the server into a pod of another node.
    #[arg(long)]
    pub(crate) remote: bool,
    /// Use IPv6 instead of IPv4.
    #[arg(long)]
    pub(crate) ipv6: bool,
    /// Leave out the third set of processes.
    #[arg(long)]
    no_control: bool,
}

/// Runs the benchmark.
///
/// # Errors
/// If the lab cannot be built, the agent does not start, or a connection fails.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("east-west", format!("{options:?}"));
    let lab = lab()?;
    let node = lab.node("n1");
    let ground = Ground::new(&lab, node, options)?;
    let mut cluster = Cluster::start(node)?;
    cluster.apply(&ground.service())?;

    let mut crr = Vec::new();
    for (index, &services) in options.services.iter().enumerate() {
        let (world, mut agent) = cluster.fill(services, node)?;
        let world = world.to_string();
        let measurements = measure(&ground, node, &mut agent, options, index == 0)?;
        report.figures.extend(measurements.figures(&world));
        crr.extend(measurements.ratio(Workload::TcpCrr).map(|ratio| (ratio.median, world)));
    }
    if let (Some((first, _)), Some((last, world))) = (crr.first(), crr.last())
        && crr.len() > 1
    {
        let name = "tcp-crr: against fewest Services";
        report.figures.push(Figure::new(name, world, "ratio", last / first).samples(crr.len()).bar(FLAT));
    }
    report.machine.end();
    Ok(report)
}

fn lab() -> Result<Lab> {
    Lab::build(
        LabSpec::three_nodes()?
            .pod("n1", "client", &["10.64.1.50", "fd00:64:0:1::50"])?
            .pod("n1", "server", &["10.64.1.11", "fd00:64:0:1::11"])?
            .pod("n2", "far-server", &["10.64.2.11", "fd00:64:0:2::11"])?,
    )
}

fn measure(
    ground: &Ground,
    node: &Node,
    agent: &mut Agent,
    options: &Options,
    all_workloads: bool,
) -> Result<Measurements> {
    let wanted = |workload: &Workload| {
        // A client that closes first soon uses up its ports: that workload runs only if it is asked for.
        let usual = options.only.is_empty() && *workload != Workload::TcpCrrClient;
        (usual || options.only.contains(workload)) && (all_workloads || workload.connects())
    };
    let workloads: Vec<Workload> = Workload::ALL.into_iter().filter(wanted).collect();
    let mut measurements = Measurements::new();
    let blocks = options.blocks.max(1);
    for block in 0..blocks {
        let sides = Side::ALL.into_iter().filter(|side| !options.no_control || *side != Side::Control);
        let mut pairs: BTreeMap<Side, Pair> =
            sides.map(|side| Ok((side, ground.start(side)?))).collect::<Result<_>>()?;
        if block == 0 {
            prove(ground, node, &mut pairs)?;
        }
        for workload in &workloads {
            let rounds = share(options.rounds, blocks, block);
            measurements.run(ground, &mut pairs, *workload, options, rounds)?;
        }
        for call in Call::ALL.into_iter().filter(|_| options.calls > 0) {
            // About a tenth of the time of a workload.
            let rounds = share(options.rounds / 2, blocks, block);
            measurements.time(ground, &mut pairs, call, options, rounds)?;
        }
        progress(format_args!("block {} of {blocks}", block + 1));
    }
    let status = agent.get("/readyz")?.0;
    ensure!(status == 200, "the agent did not stay ready; its log:\n{}", agent.log());
    Ok(measurements)
}

/// Proves that one side goes through the programs and the other does not.
fn prove(ground: &Ground, node: &Node, pairs: &mut BTreeMap<Side, Pair>) -> Result<()> {
    let maps = KernelMaps::open(&PinDir::new(node.pin_dir()))?;
    for (side, pair) in pairs {
        let before = maps.counter(Counter::Connected)?;
        let server = ground.target(*side, Listener::AnswerAndClose);
        pair.ask(&Job::Run { workload: Workload::TcpCrr, server, warm_up_us: 0, measure_us: 1000 })?;
        let translated = maps.counter(Counter::Connected)? - before;
        ensure!((translated > 0) == (*side == Side::Vipr), "{side:?}: {translated} connections translated");
    }
    Ok(())
}
