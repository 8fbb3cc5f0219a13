//! `east-west`: connections and datagrams from a pod through a clusterIP, against the same without a proxy.
//!
//! Two sets of processes do the same in the same pods. One is below the cgroup to which the agent has attached its
//! programs and connects to the clusterIP; the other is in a cgroup beside it, where no program runs, and connects to
//! the pod's own address. A third one, like the second, shows what the machine makes of no difference at all.

mod client;
mod measure;
mod server;
mod sides;
mod wire;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::Counter;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::lab::{Agent, Lab, LabSpec, Node};
use serde_json::{Value, json};

pub(crate) use client::{ClientArgs, client};
pub(crate) use server::{ServerArgs, server};

use crate::objects::World;
use crate::progress;
use crate::report::{Bar, Figure, Report};
use measure::Measurements;
use sides::{Ground, Pair, Side};
use wire::{Call, Job, Listener, Workload};

/// Endpoints of each Service that is only there to be there.
const FILLING_ENDPOINTS: usize = 10;
/// How long the agent may take to program everything.
const READY: Duration = Duration::from_secs(120);
/// Connections per second of the largest world over those of the smallest, both as ratios to no proxy.
const FLAT: Bar = Bar::AtLeast(0.98);

/// Options of `east-west`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Numbers of Services in the cluster. All workloads run with the first, those that open connections with each.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1000, 10_000])]
    pub(crate) services: Vec<usize>,
    /// Workloads to run [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Rounds of each workload and side.
    #[arg(long, default_value_t = 120)]
    rounds: usize,
    /// Fresh processes so many times: a process is lucky or unlucky with its memory.
    #[arg(long, default_value_t = 6)]
    blocks: usize,
    /// Length of a round in milliseconds.
    #[arg(long, default_value_t = 50)]
    round_ms: u64,
    /// Calls of each kind in a round; 0 to time no single calls.
    #[arg(long, default_value_t = 500)]
    calls: u32,
    /// CPU of the client and CPU of the server. On one and the same nothing but the work itself takes time; on two,
    /// waking the other one does.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1])]
    pub(crate) cpus: Vec<usize>,
    /// The server is a pod of another node.
    #[arg(long)]
    pub(crate) remote: bool,
    /// IPv6 instead of IPv4.
    #[arg(long)]
    pub(crate) ipv6: bool,
    /// Without the third set of processes.
    #[arg(long)]
    no_control: bool,
}

/// Runs the benchmark.
///
/// # Errors
/// If the lab or the agent cannot be had, or a connection fails.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("east-west", format!("{options:?}"));
    let lab = lab()?;
    let node = lab.node("n1");
    let ground = Ground::new(&lab, node, options)?;
    // The node's loopback is its own: the server listens where the agent is.
    let listener = node.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))?;
    let api = ApiServer::start_on(listener?)?;
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig)?;
    api.apply_all([node.object(), service_cidr()])?;
    api.apply_all(bench_service(&ground))?;

    let mut crr = Vec::new();
    let mut filled = 1;
    for (index, &services) in options.services.iter().enumerate() {
        let filling = World { services, endpoints: FILLING_ENDPOINTS };
        for service in filled..services {
            api.apply_all(filling.service_and_slices(service))?;
        }
        filled = filled.max(services);
        // An agent that starts makes its maps large enough.
        let mut agent =
            node.agent()?.kubeconfig(&kubeconfig).flag("run-dir", folder.path().display()).quiet();
        agent.start()?;
        agent.wait_ready(READY)?;
        let world = filling.to_string();
        progress(format_args!("{world}: programmed"));
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
        (options.only.is_empty() || options.only.contains(workload))
            && (all_workloads || *workload == Workload::TcpCrr)
    };
    let workloads: Vec<Workload> = Workload::ALL.into_iter().filter(wanted).collect();
    let mut measurements = Measurements::default();
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
            // A tenth of the time of a workload, about.
            let rounds = share(options.rounds / 2, blocks, block);
            measurements.time(ground, &mut pairs, call, options, rounds)?;
        }
        progress(format_args!("block {} of {blocks}", block + 1));
    }
    let status = agent.get("/readyz")?.0;
    ensure!(status == 200, "the agent did not stay ready; its log:\n{}", agent.log());
    Ok(measurements)
}

/// Block `block`'s part of `rounds`.
fn share(rounds: usize, blocks: usize, block: usize) -> usize {
    rounds * (block + 1) / blocks - rounds * block / blocks
}

/// The comparison is what it says: one side goes through the programs, the other does not.
fn prove(ground: &Ground, node: &Node, pairs: &mut BTreeMap<Side, Pair>) -> Result<()> {
    let maps = KernelMaps::open(&PinDir::new(node.pin_dir()), false)?;
    for (side, pair) in pairs {
        let before = maps.counter(Counter::Connected)?;
        let server = ground.target(*side, Listener::AnswerAndClose);
        pair.ask(&Job::Run { workload: Workload::TcpCrr, server, warm_up_us: 0, measure_us: 1000 })?;
        let translated = maps.counter(Counter::Connected)? - before;
        ensure!((translated > 0) == (*side == Side::Vipr), "{side:?}: {translated} connections translated");
    }
    Ok(())
}

/// The Service that is measured: a port for each listener, one endpoint.
fn bench_service(ground: &Ground) -> [Value; 2] {
    let (metadata, family) = (
        json!({ "namespace": "bench", "name": "target" }),
        if ground.vip.is_ipv4() { "IPv4" } else { "IPv6" },
    );
    let ports: Vec<Value> = Listener::ALL
        .into_iter()
        .map(|listener| {
            let port = listener.port(Side::Vipr.base_port());
            json!({ "name": format!("p{port}"), "protocol": listener.protocol(), "port": port })
        })
        .collect();
    let mut slice_metadata = metadata.clone();
    slice_metadata["labels"] = json!({ "kubernetes.io/service-name": "target" });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "type": "ClusterIP", "clusterIP": ground.vip, "clusterIPs": [ground.vip], "ipFamilies": [family],
            "ports": ports,
        },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": slice_metadata,
        "addressType": family, "ports": ports,
        "endpoints": [{ "addresses": [ground.server_address], "conditions": { "ready": true } }],
    });
    [service, slice]
}

fn service_cidr() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/12", "fd00:96::/112"] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_share_all_rounds() {
        for (rounds, blocks) in [(120, 6), (7, 3), (2, 5), (0, 2)] {
            let sum: usize = (0..blocks).map(|block| share(rounds, blocks, block)).sum();
            assert_eq!(sum, rounds);
        }
    }

    #[test]
    fn every_listener_has_a_port() {
        let ports: std::collections::BTreeSet<u16> =
            Listener::ALL.into_iter().map(|listener| listener.port(7000)).collect();
        assert_eq!(ports.len(), Listener::ALL.len());
    }
}
