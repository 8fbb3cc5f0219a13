//! Which devices the agent takes for external and for pods', in clusters of several shapes, and that it follows them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_tests::lab::network::{BRIDGE, Network, NodeLinks, OVERLAY, PodLinks};
use proxy_tests::lab::{Agent, Lab, LabSpec, Node, binary};
use proxy_tests::scenarios::until;
use serde_json::Value;
use tempfile::TempDir;

/// A lab with an agent on `n1` that has nothing to serve.
struct Setting {
    // Dropped first: it runs in the lab.
    agent: Agent,
    lab: Lab,
    manifests: TempDir,
}

impl Setting {
    fn new(network: Network, flags: &[(&str, &str)]) -> Result<Self> {
        let lab = Lab::build(LabSpec::cases()?.network(network))?;
        let manifests = tempfile::tempdir()?;
        let mut agent = lab.node("n1").agent()?.manifests(manifests.path());
        for (flag, value) in flags {
            agent = agent.flag(flag, value);
        }
        agent.start()?;
        agent.wait_ready(Duration::from_secs(60))?;
        Ok(Self { agent, lab, manifests })
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    /// Waits until exactly `want` is attached: role and sources by name.
    fn wait(&self, want: &[(&str, &str, &[&str])]) -> Result<()> {
        let mut want: Vec<String> = want
            .iter()
            .map(|(device, role, sources)| format!("{device} {role} {}", sources.join(" ")))
            .collect();
        want.sort();
        let look = || {
            let got = devices(&self.agent.tool("status", &[])?)?;
            Ok((got == want).then_some(()))
        };
        let seen = || devices(&self.agent.tool("status", &[])?);
        until("the devices", look).with_context(|| format!("want {want:?}, got {:?}", seen()))
    }

    /// Names of the programs on a device, ingress and egress.
    fn programs(&self, device: &str) -> Result<Vec<String>> {
        self.node().host().net().enter(|| {
            let mut names = Vec::new();
            for attach_type in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, programs) = SchedClassifier::query_tcx(device, attach_type)?;
                names.extend(programs.iter().filter_map(|program| program.name_as_str().map(str::to_owned)));
            }
            Ok(names)
        })?
    }
}

/// What is attached, from `status`.
fn devices(status: &Value) -> Result<Vec<String>> {
    let all = status["agent"]["devices"].as_array().context("status tells no devices")?;
    let mut lines = Vec::new();
    for device in all {
        let text = |key: &str| device[key].as_str().unwrap_or_default();
        let sources: Vec<&str> =
            device["sources"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        ensure!(!text("reason").is_empty(), "{device}");
        if !text("attached").is_empty() {
            lines.push(format!("{} {} {}", text("name"), text("role"), sources.join(" ")));
        }
    }
    lines.sort();
    Ok(lines)
}

const ETH0: (&str, &str, &[&str]) = ("eth0", "external", &["192.0.2.10", "2001:db8:1::10"]);
const ETH1: (&str, &str, &[&str]) = ("eth1", "external", &["198.51.100.10", "2001:db8:2::10"]);

#[test]
fn routed_pods_are_followed_as_they_come_and_go() -> Result<()> {
    let setting = Setting::new(Network::default(), &[])?;
    let of_pod = |name: &str| setting.lab.pod(name).host_device().to_owned();
    let names = ["P", "L1", "L2", "V1"].map(of_pod);
    // What their host routes ask for: a pod has an address of each family, of IPv4, or of IPv6.
    let (v4, v6): (&str, &str) = ("192.0.2.10", "2001:db8:1::10");
    let sources: [&[&str]; 4] = [&[v4, v6], &[v4], &[v4], &[v6]];
    let pods = names.iter().zip(sources).map(|(name, sources)| (name.as_str(), "pod", sources));
    let want: Vec<_> = pods.chain([ETH0, ETH1]).collect();
    setting.wait(&want)?;
    assert_eq!(setting.programs("eth0")?, ["edge_ingress", "edge_egress"]);
    assert_eq!(setting.programs(&names[0])?, ["pod_ingress", "pod_egress"]);

    let new = setting.lab.add_pod("n1", "L3", &["10.64.1.13"])?;
    let mut more = want.clone();
    more.push((new.host_device(), "pod", sources[1]));
    setting.wait(&more)?;
    setting.lab.remove_pod("L3")?;
    setting.wait(&want)
}

#[test]
fn an_agent_that_starts_again_finds_what_has_changed() -> Result<()> {
    let mut setting = Setting::new(Network::default(), &[("devices", "eth0"), ("pod-interfaces", "none")])?;
    setting.wait(&[ETH0])?;
    assert_eq!(setting.programs("eth1")?, [""; 0]);
    setting.agent.kill9()?;
    assert_eq!(setting.programs("eth0")?, ["edge_ingress", "edge_egress"], "attached without an agent");
    setting.agent.start()?;
    setting.agent.wait_ready(Duration::from_secs(60))?;
    setting.wait(&[ETH0])?;
    setting.agent.terminate()?;

    let host = setting.node().host();
    let mut agent = setting.node().agent()?.manifests(setting.manifests.path());
    agent = agent.flag("devices", "eth1").flag("pod-interfaces", "none").flag("no-tcx", true);
    agent.start()?;
    agent.wait_ready(Duration::from_secs(60))?;
    until("eth0 without programs", || Ok(setting.programs("eth0")?.is_empty().then_some(())))?;
    let mut tc = host.command("tc");
    tc.args(["filter", "show", "dev", "eth1", "ingress"]);
    let shown = tc.text()?;
    assert!(shown.contains("edge_ingress"), "{shown}");
    agent.terminate()?;

    let pins = setting.node().pin_dir();
    let mut cleanup = host.command(binary::proxy_agent()?);
    cleanup.args(["cleanup", "--pin-dir", &pins.display().to_string()]);
    cleanup.text()?;
    assert!(!pins.exists());
    for device in ["eth0", "eth1"] {
        assert_eq!(setting.programs(device)?, [""; 0], "{device}");
    }
    Ok(())
}

#[test]
fn pods_behind_a_bridge_and_nodes_behind_a_tunnel() -> Result<()> {
    let network = Network { pods: PodLinks::Bridged, nodes: NodeLinks::Vxlan, ..Network::default() };
    let flags = [("detect-local-mode", "BridgeInterface"), ("pod-bridge-interface", BRIDGE)];
    let setting = Setting::new(network, &flags)?;
    let of_pod = |name: &str| setting.lab.pod(name).host_device().to_owned();
    let names = ["P", "L1", "L2", "V1"].map(of_pod);
    let bridge: &[&str] = &["10.64.1.1", "fd00:64:0:1::1"];
    let tunnel: &[&str] = &["10.64.1.254", "fd00:64:0:1::fe"];
    let pods = names.iter().map(|name| (name.as_str(), "pod", bridge));
    setting.wait(&pods.chain([ETH0, ETH1, (OVERLAY, "external", tunnel)]).collect::<Vec<_>>())?;
    assert_eq!(setting.programs(BRIDGE)?, [""; 0]);
    let status = setting.agent.tool("status", &[])?;
    for device in status["agent"]["devices"].as_array().context("no devices")? {
        assert_eq!(device["near"] == true, device["role"] == "pod", "{device}");
    }
    Ok(())
}

#[test]
fn a_name_that_no_device_has_is_a_problem() -> Result<()> {
    let setting = Setting::new(Network::default(), &[("devices", "eth0,eth7")])?;
    let status = setting.agent.tool("status", &[])?;
    assert_eq!(status["agent"]["problems"]["--devices"][0], "there is no device `eth7`");
    let mut lan = String::from("link add eth7 type veth peer name far7\n");
    lan.push_str("link set eth7 up\n");
    setting.node().host().net().ip(&lan)?;
    until("the problem's end", || {
        let status = setting.agent.tool("status", &[])?;
        Ok(status["agent"]["problems"].get("--devices").is_none().then_some(()))
    })?;
    assert_eq!(setting.programs("eth7")?, ["edge_ingress", "edge_egress"]);
    Ok(())
}
