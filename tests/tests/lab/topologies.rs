//! A few checks of everything ([`proxy_tests::cases::smoke`]) on networks of other shapes than that of the cases, and
//! beside rules of other programs in the kernel. Each test runs with pods whose sockets are seen, and with pods whose
//! packets are.
//!
//! Bridged packets meet netfilter (`bridge-nf-call-iptables`), as on every node of a cluster. Otherwise the kernel's
//! connection tracking would see only one direction of a connection between two pods of one bridge.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::panic::resume_unwind;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_tests::cases::{Check, Pods, Sender, at_the_node, not_allowed, smoke};
use proxy_tests::lab::network::{Network, NodeLinks, PodLinks, Rules};
use proxy_tests::lab::{Agent, Attempt, Held, Lab, LabSpec, NodeSpec, Proc};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::live;

/// Addresses of X, one of each family.
const X: [&str; 2] = ["203.0.113.7", "2001:db8:ff::7"];

/// Runs the smoke cases on the nodes, pods and clients of the cases.
fn run(network: Network) -> Result<()> {
    run_on(LabSpec::cases()?.network(network), |_| Ok(()))
}

fn run_on(spec: LabSpec, prepare: impl Fn(&Lab) -> Result<()>) -> Result<()> {
    for pods in [Pods::Seen, Pods::Unseen] {
        live::check(smoke(), spec.clone(), pods, &prepare).with_context(|| format!("pods are {pods:?}"))?;
    }
    if spec.network.rules.allowed_to_pods.is_some() {
        live::check(not_allowed(), spec, Pods::Seen, &prepare).context("the filter")?;
    }
    Ok(())
}

/// Each node has one address, which also belongs to a Service.
#[test]
fn services_at_the_address_of_the_node() -> Result<()> {
    for pods in [Pods::Seen, Pods::Unseen] {
        live::check(at_the_node(), LabSpec::cases()?, pods, |_| Ok(()))
            .with_context(|| format!("pods are {pods:?}"))?;
    }
    Ok(())
}

fn with(rules: Rules) -> Network {
    Network { rules, ..Network::default() }
}

#[test]
fn routed_pods() -> Result<()> {
    run(Network::default())
}

#[test]
fn routed_pods_with_masquerade() -> Result<()> {
    run(with(Rules { masquerade: true, ..Rules::default() }))
}

#[test]
fn routed_pods_where_little_is_forwarded() -> Result<()> {
    run(with(Rules { forward_drop: true, ..Rules::default() }))
}

#[test]
fn routed_pods_with_strict_rp_filter() -> Result<()> {
    run(with(Rules { strict_rp_filter: true, ..Rules::default() }))
}

#[test]
fn routed_pods_with_a_filter_before_them() -> Result<()> {
    let allowed_to_pods = Some(X.map(str::to_owned).to_vec());
    run(with(Rules { allowed_to_pods, ..Rules::default() }))
}

#[test]
fn routed_pods_with_everything() -> Result<()> {
    run(with(Rules::all(&X)))
}

fn bridged(rules: Rules) -> Network {
    Network { pods: PodLinks::Bridged, rules, ..Network::default() }
}

#[test]
fn bridged_pods() -> Result<()> {
    run(bridged(Rules::default()))
}

#[test]
fn bridged_pods_with_everything() -> Result<()> {
    run(bridged(Rules::all(&X)))
}

fn overlay(pods: PodLinks, rules: Rules) -> Network {
    Network { pods, nodes: NodeLinks::Vxlan, rules }
}

#[test]
fn an_overlay_between_nodes() -> Result<()> {
    run(overlay(PodLinks::Routed, Rules::default()))
}

#[test]
fn an_overlay_between_nodes_with_everything() -> Result<()> {
    run(overlay(PodLinks::Routed, Rules::all(&X)))
}

/// The network as flannel makes it.
#[test]
fn an_overlay_between_bridges_with_everything() -> Result<()> {
    run(overlay(PodLinks::Bridged, Rules::all(&X)))
}

/// Returns the lab of the cases with a second device on n1 to n3, by which nodes reach each other's pods.
fn two_devices(rules: Rules) -> Result<LabSpec> {
    let mut spec = LabSpec::cases()?;
    for (node, number) in spec.nodes.iter_mut().zip([10, 20, 30]) {
        let addresses = [format!("198.51.100.{number}"), format!("2001:db8:2::{number}")];
        *node = NodeSpec::clone(node).eth1(&[&addresses[0], &addresses[1]])?;
    }
    Ok(spec.network(Network { nodes: NodeLinks::Eth1, rules, ..Network::default() }))
}

#[test]
fn two_devices_and_a_client_through_the_first() -> Result<()> {
    run_on(two_devices(Rules::default())?, |_| Ok(()))?;
    run_on(two_devices(Rules::all(&X))?, |_| Ok(()))
}

#[test]
fn two_devices_and_a_client_through_the_second() -> Result<()> {
    for rules in [Rules::default(), Rules::all(&X)] {
        run_on(two_devices(rules)?, |lab| lab.through_eth1("X", "n1"))?;
    }
    Ok(())
}

/// Makes every packet of pods leave by `eth1` of their node, also replies to clients that came by `eth0`. On EKS,
/// pods likewise have addresses of a second device, and rules by which their packets leave. That network passes on no
/// address that is not its own.
fn pods_by_eth1(lab: &Lab) -> Result<()> {
    by_eth1(lab)?;
    lab.hub().nft(
        "table inet fabric {
           chain from_eth1 {
             type filter hook prerouting priority raw;
             iifname lan1 ip saddr != { 198.51.100.0/24, 10.64.0.0/12 } drop
             iifname lan1 ip6 saddr != { 2001:db8:2::/64, fd00:64::/48, fe80::/10 } drop
           }
         }",
    )
}

fn by_eth1(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        let mut batch = String::new();
        for (option, network, hub) in
            [("", "198.51.100.0/24", "198.51.100.1"), ("-6 ", "2001:db8:2::/64", "2001:db8:2::1")]
        {
            writeln!(batch, "{option}route add {network} dev eth1 table 2")?;
            writeln!(batch, "{option}route add default via {hub} dev eth1 table 2")?;
        }
        for pods in &node.spec().pod_cidrs {
            let option = if pods.contains(':') { "-6 " } else { "" };
            writeln!(batch, "{option}rule add pref 512 to {pods} lookup main")?;
            writeln!(batch, "{option}rule add pref 1536 from {pods} lookup 2")?;
        }
        node.host().net().ip(&batch)?;
    }
    Ok(())
}

#[test]
fn pods_that_are_routed_by_a_second_device() -> Result<()> {
    for rules in [
        Rules::default(),
        // As with AWS' CNI, connections to others than pods get the node's address. Packets that conntrack finds
        // invalid are dropped.
        Rules { masquerade: true, forward_drop: true, ..Rules::default() },
    ] {
        let spec = two_devices(rules)?;
        let network = Network { nodes: NodeLinks::Eth0, ..spec.network.clone() };
        run_on(spec.network(network), pods_by_eth1)?;
    }
    Ok(())
}

/// Frontends of both families, each with a pod of n1 behind it.
const FRONTENDS: [(&str, &str, &str); 2] =
    [("IPv4", "198.18.5.5", "10.64.1.50"), ("IPv6", "2001:db8:5::5", "fd00:64:0:1::50")];

/// Returns a Service at [`FRONTENDS`], port 80.
fn at_frontends() -> Vec<Value> {
    let slices = FRONTENDS.map(|(family, _, pod)| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "namespace": "d", "name": family.to_lowercase(), "labels": { "kubernetes.io/service-name": "s" },
            },
            "ports": [{ "name": "web", "protocol": "TCP", "port": 8080 }],
            "endpoints": [{ "addresses": [pod], "conditions": { "ready": true }, "nodeName": "n1" }],
        })
    });
    let addresses = FRONTENDS.map(|(_, address, _)| json!({ "ip": address }));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "d", "name": "s" },
        "spec": {
            "type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00:96::5"],
            "ports": [{ "name": "web", "protocol": "TCP", "port": 80 }],
        },
        "status": { "loadBalancer": { "ingress": addresses } },
    });
    [service].into_iter().chain(slices).collect()
}

/// Returns the number of packets that a device of n1 has sent.
fn sent(lab: &Lab, device: &str) -> Result<u64> {
    lab.node("n1").host().packets(device).map(|[_, sent]| sent)
}

/// Drops packets on the network between the nodes that come from or go to (`end`) the client.
fn cut(lab: &Lab, end: &str) -> Result<()> {
    let [v4, v6] = X;
    lab.hub().nft(&format!(
        "table inet cut_{end} {{
           chain passing {{
             type filter hook prerouting priority raw;
             ip {end} {v4} drop
             ip6 {end} {v6} drop
           }}
         }}"
    ))
}

fn mend(lab: &Lab, end: &str) -> Result<()> {
    lab.hub().nft(&format!("delete table inet cut_{end}"))
}

/// A client that is connected to a Service at [`FRONTENDS`] by `eth0` of n1, whose pod is routed by `eth1`.
struct Connected {
    held: Held,
    // Dropped before the lab, in which it runs.
    _agent: Agent,
    lab: Lab,
    _manifests: TempDir,
}

impl Connected {
    fn open(target: SocketAddr) -> Result<Self> {
        let spec = two_devices(Rules::default())?;
        let lab = Lab::build(LabSpec { network: Network::default(), ..spec })?;
        by_eth1(&lab)?;
        let manifests = tempfile::tempdir()?;
        let mut agent = lab.node("n1").agent()?.manifests(manifests.path());
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": at_frontends() });
        fs::write(manifests.path().join("objects.json"), serde_json::to_vec(&list)?)?;
        lab.pod("P").serve().tcp(8080).start()?;
        agent.start_ready()?;
        let held = lab.client("X").hold(target).timeout(Duration::from_secs(20)).open()?;
        let mut connected = Self { held, _agent: agent, lab, _manifests: manifests };
        connected.is_answered_by("eth0", "eth1")?;
        Ok(connected)
    }

    fn is_answered_by(&mut self, device: &str, other: &str) -> Result<()> {
        let before = [sent(&self.lab, device)?, sent(&self.lab, other)?];
        for _ in 0..20 {
            let answer = self.held.say("are you there?")?;
            ensure!(answer.ok, "{answer:?}");
        }
        let [own, others] = [sent(&self.lab, device)? - before[0], sent(&self.lab, other)? - before[1]];
        ensure!(own >= 20 && others < 10, "{own} packets by {device}, {others} by {other}");
        Ok(())
    }

    /// Lets the client ask. Once the answer has been lost, and sent again, `what` is called. Then the client must get
    /// the answer.
    fn is_answered_after(&mut self, what: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
        let Self { held, lab, .. } = self;
        cut(lab, "daddr")?;
        let before = sent(lab, "eth0")?;
        let answer = thread::scope(|scope| -> Result<Attempt> {
            let asking = scope.spawn(|| held.say("and now?"));
            until("an answer that is lost", || Ok((sent(lab, "eth0")? >= before + 2).then_some(())))?;
            what(lab)?;
            asking.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        ensure!(answer.ok, "{answer:?}");
        Ok(())
    }
}

fn at_each_frontend(test: impl Fn(SocketAddr) -> Result<()>) -> Result<()> {
    for (family, address, _) in FRONTENDS {
        test(SocketAddr::new(address.parse()?, 80)).context(family)?;
    }
    Ok(())
}

/// A connection goes on when the client's uplink is withdrawn while the server sends. Later the connection returns to
/// that uplink.
#[test]
fn an_uplink_that_is_withdrawn() -> Result<()> {
    at_each_frontend(|target| {
        let mut connected = Connected::open(target)?;
        connected.is_answered_after(|lab| {
            // No packets of the client arrive until the answer has come.
            cut(lab, "saddr")?;
            lab.node("n1").host().net().ip("link set eth0 down")?;
            mend(lab, "daddr")
        })?;
        let back = match target {
            SocketAddr::V4(_) => "route add default via 192.0.2.1",
            SocketAddr::V6(_) => {
                "address add 2001:db8:1::10/64 dev eth0 nodad\n-6 route add default via 2001:db8:1::1"
            }
        };
        connected.lab.node("n1").host().net().ip(&format!("link set eth0 up\n{back}"))?;
        mend(&connected.lab, "saddr")?;
        connected.held.say("back again")?;
        connected.is_answered_by("eth0", "eth1").context("it is back")
    })
}

/// The network leads the client in by the other uplink, while the first uplink stays up but leads nowhere. The client
/// repeats its data, which has not been acknowledged, and the replies then follow the new way.
#[test]
fn a_client_that_comes_by_another_uplink() -> Result<()> {
    at_each_frontend(|target| {
        let mut connected = Connected::open(target)?;
        connected.is_answered_after(|lab| {
            lab.hub().nft(
                "table inet dead {
                   chain passing {
                     type filter hook prerouting priority raw;
                     iifname lan0 ip daddr 203.0.113.7 drop
                     iifname lan0 ip6 daddr 2001:db8:ff::7 drop
                   }
                 }",
            )?;
            lab.through_eth1("X", "n1")?;
            mend(lab, "daddr")
        })?;
        connected.is_answered_by("eth1", "eth0")
    })
}

/// With strict rp_filter, the kernel drops packets of a client to a pod whose replies are routed by another device.
/// `status` reports that.
#[test]
fn a_filter_before_pods_of_another_device_is_told() -> Result<()> {
    let spec = two_devices(Rules { strict_rp_filter: true, ..Rules::default() })?;
    let lab =
        Lab::build(LabSpec { network: Network { nodes: NodeLinks::Eth0, ..spec.network.clone() }, ..spec })?;
    let manifests = tempfile::tempdir()?;
    let mut agent = lab.node("n1").agent()?.manifests(manifests.path());
    agent.start_ready()?;
    ensure!(told(&agent)?.is_none(), "{:?}", told(&agent)?);
    by_eth1(&lab)?;
    let problem = until("the problem", || told(&agent))?;
    ensure!(problem.contains("net/ipv4/conf/eth0/rp_filter=2"), "{problem}");
    // The loose setting of one device overrides the setting of all. The new rule makes the agent look again.
    lab.node("n1").host().net().sysctl("net/ipv4/conf/eth0/rp_filter", "2")?;
    lab.node("n1").host().net().ip("rule add from 10.64.9.9 lookup 9")?;
    until("its end", || Ok(told(&agent)?.is_none().then_some(())))
}

fn told(agent: &Agent) -> Result<Option<String>> {
    let status = agent.tool("status", &[])?;
    Ok(status["agent"]["problems"]["device eth0"][0].as_str().map(str::to_owned))
}

/// An agent of the machine on which the nodes are pods. It has Services at the same addresses, with other endpoints.
struct Outer {
    _agent: Agent,
    _manifests: TempDir,
    _pauses: Vec<Proc>,
}

impl Outer {
    fn start(lab: &Lab) -> Result<Self> {
        let machine = lab.outer("192.0.2.0/24,2001:db8:1::/64")?;
        let manifests = tempfile::tempdir()?;
        let mut items = vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "outer", "name": "s" },
            "spec": {
                "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{ "name": "web", "port": 80 }, { "name": "dns", "port": 53, "protocol": "UDP" }],
            },
        })];
        for (family, address) in [("IPv4", "192.0.2.20"), ("IPv6", "2001:db8:1::20")] {
            items.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "namespace": "outer", "name": family.to_lowercase(),
                    "labels": { "kubernetes.io/service-name": "s" },
                },
                "ports": [
                    { "name": "web", "port": 9080 }, { "name": "dns", "port": 9053, "protocol": "UDP" },
                ],
                "endpoints": [{ "addresses": [address] }],
            }));
        }
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        fs::write(manifests.path().join("objects.json"), serde_json::to_vec(&list)?)?;
        lab.node("n2").host().serve().name("outer").tcp(9080).udp(9053).start()?;
        let mut agent = machine.agent()?.manifests(manifests.path());
        agent.start_ready()?;

        let mut pauses = Vec::new();
        for (node, cgroup) in lab.nodes().iter().zip(OUTER_PODS) {
            let pause = machine.place("pause", &format!("{cgroup}/pause"), node.host().net())?;
            let mut command = pause.command("unshare");
            command.args(["--mount", "sleep", "infinity"]);
            pauses.push(command.spawn()?);
        }
        let pins = PinDir::new(machine.pin_dir());
        until("the pods' sandboxes", || {
            let contents = KernelMaps::open(&pins)?.contents()?;
            Ok((contents.sandboxes.len() == OUTER_PODS.len()).then_some(()))
        })?;
        Ok(Self { _agent: agent, _manifests: manifests, _pauses: pauses })
    }
}

/// A clusterIP of both clusters.
const CLUSTER_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
/// Cgroups of the pods in which the nodes run.
const OUTER_PODS: [&str; 3] = [
    "kubepods/burstable/pod3f2b7c1e-0001-4a5b-8c9d-000000000001",
    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3f2b7c1e_0002_4a5b_8c9d_000000000002.slice",
    "kubepods/pod3f2b7c1e-0003-4a5b-8c9d-000000000003",
];

/// The nodes run in pods of another cluster, which has Services at the same addresses and an agent of its own.
#[test]
fn a_cluster_in_pods_of_another() -> Result<()> {
    let mut spec = LabSpec::cases()?;
    let in_pods = |(node, pod): (NodeSpec, &str)| node.in_cgroup(&format!("{pod}/node"));
    spec.nodes = spec.nodes.into_iter().zip(OUTER_PODS).map(in_pods).collect();
    let mut case = smoke();
    for step in &mut case.steps {
        // A client outside of both clusters asks the outer one.
        step.checks.retain(|check| match check {
            Check::Connect(connect) => connect.sender != Sender::X || connect.dest.addr.ip() != CLUSTER_IP,
            Check::Open(..) | Check::Say(..) | Check::Frontends(..) | Check::ClusterSet(..) => true,
            Check::AffinitySeconds(..) => true,
        });
    }
    for pods in [Pods::Seen, Pods::Unseen] {
        let outer = RefCell::new(None);
        let start = |lab: &Lab| {
            *outer.borrow_mut() = Some(Outer::start(lab)?);
            Ok(())
        };
        live::check(case.clone(), spec.clone(), pods, start).with_context(|| format!("pods are {pods:?}"))?;
    }
    Ok(())
}

/// Pods of other nodes are reached by `eth0`; the client's requests come by `eth1`.
#[test]
fn a_client_through_a_device_that_nobody_else_uses() -> Result<()> {
    run_on(LabSpec::cases()?, |lab| lab.through_eth1("X", "n1"))
}
