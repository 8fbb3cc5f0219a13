//! The devices that the agent treats as external and as pods', in clusters of several shapes, and their changes.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_tests::lab::network::{BRIDGE, Network, NodeLinks, OVERLAY, PodLinks};
use proxy_tests::lab::{Agent, Lab, LabSpec, Node, Place, binary};
use proxy_tests::scenarios::{NODE, OUTSIDE_ADDRESS, World, until};
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
        until("the devices", || Ok((self.seen()? == want).then_some(())))
            .with_context(|| format!("want {want:?}, got {:?}", self.seen()))
    }

    fn seen(&self) -> Result<Vec<String>> {
        devices(&self.agent.tool("status", &[])?)
    }

    /// Returns the host's devices of the pods P, L1, L2 and V1.
    fn of_pods(&self) -> [String; 4] {
        ["P", "L1", "L2", "V1"].map(|name| self.lab.pod(name).host_device().to_owned())
    }

    /// Returns the names of the programs on a device, ingress and egress.
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

/// Returns the attached devices of `status`, one line each.
fn devices(status: &Value) -> Result<Vec<String>> {
    let all = status["agent"]["devices"].as_array().context("status tells no devices")?;
    let mut lines = Vec::new();
    for device in all {
        let sources: Vec<&str> =
            device["sources"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        ensure!(!text(device, "reason").is_empty(), "{device}");
        if !text(device, "attached").is_empty() {
            lines.push(format!("{} {} {}", text(device, "name"), text(device, "role"), sources.join(" ")));
        }
    }
    lines.sort();
    Ok(lines)
}

fn text<'v>(object: &'v Value, key: &str) -> &'v str {
    object[key].as_str().unwrap_or_default()
}

const ETH0: (&str, &str, &[&str]) = ("eth0", "external", &["192.0.2.10", "2001:db8:1::10"]);
const ETH1: (&str, &str, &[&str]) = ("eth1", "external", &["198.51.100.10", "2001:db8:2::10"]);

#[test]
fn routed_pods_are_followed_as_they_come_and_go() -> Result<()> {
    let setting = Setting::new(Network::default(), &[])?;
    let names = setting.of_pods();
    // Sources that the pods' host routes give: a pod has an address of each family, of IPv4, or of IPv6.
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

/// The agent checks each link periodically, even without an event of the device.
#[test]
fn programs_that_somebody_detaches_come_back() -> Result<()> {
    let setting = Setting::new(Network::default(), &[("devices", "eth0"), ("pod-interfaces", "none")])?;
    setting.wait(&[ETH0])?;
    for link in std::fs::read_dir(setting.node().pin_dir().join("links"))? {
        let link = link?.path();
        if link.file_name().is_some_and(|name| name.to_string_lossy().starts_with("edge_")) {
            let mut bpftool = setting.node().host().command("bpftool");
            bpftool.args(["link", "detach", "pinned"]).arg(&link);
            bpftool.text().context("the lab needs bpftool")?;
        }
    }
    assert_eq!(setting.programs("eth0")?, [""; 0]);
    let both = ["edge_ingress", "edge_egress"];
    until("both", || Ok((setting.programs("eth0")? == both).then_some(())))
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
    let names = setting.of_pods();
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

/// A queueing discipline of the kind `ingress` has no place for filters on the way out.
#[test]
fn a_node_is_not_ready_before_its_external_devices_are_attached() -> Result<()> {
    let lab = Lab::build(LabSpec::cases()?)?;
    let (host, pod) = (lab.node("n1").host(), lab.pod("P").host_device().to_owned());
    tc(host, "qdisc add dev eth1 ingress")?;
    tc(host, &format!("qdisc add dev {pod} ingress"))?;
    let manifests = tempfile::tempdir()?;
    let mut agent = lab.node("n1").agent()?.manifests(manifests.path()).flag("no-tcx", true);
    agent.start()?;
    let body = until("the reason", || {
        let answer = agent.get("/readyz").ok();
        Ok(answer.map(|(_, body)| body).filter(|body| body.contains("device eth1: ")))
    })?;
    ensure!(body.starts_with("not ready: device eth1: edge_egress: "), "{body}");
    let status = agent.tool("status", &[])?;
    let problems = &status["agent"]["problems"];
    for device in ["eth1", &pod] {
        ensure!(problems[format!("device {device}")].is_array(), "{device}: {problems}");
    }
    // The attached devices serve meanwhile.
    ensure!(devices(&status)?.iter().any(|line| line.starts_with("eth0 external")), "{status}");
    assert_eq!(agent.get("/readyz")?.0, 503);

    // A pod's interface does not delay readiness: it may be about to go.
    tc(host, "qdisc delete dev eth1 ingress")?;
    agent.wait_ready(Duration::from_secs(60))?;
    let status = agent.tool("status", &[])?;
    ensure!(status["agent"]["problems"][format!("device {pod}")].is_array(), "{status}");
    // A node that has been ready stays so.
    tc(host, &format!("qdisc delete dev {pod} ingress"))?;
    host.net().ip("link delete eth1")?;
    assert_eq!(agent.get("/readyz")?.0, 200);
    Ok(())
}

/// Objects of another program are there before, beside and after the agent's own, although the agent is killed.
#[test]
fn cleanup_takes_back_what_was_made_and_nothing_else() -> Result<()> {
    let lab = Lab::build(LabSpec::cases()?)?;
    let (node, host) = (lab.node("n1"), lab.node("n1").host());
    host.net().sysctl("net/ipv4/ip_local_reserved_ports", "8080,29000-30100")?;
    tc(host, "qdisc add dev eth1 clsact")?;
    let manifests = tempfile::tempdir()?;
    let mut agent = node.agent()?.manifests(manifests.path()).flag("no-tcx", true);
    agent.start_ready()?;
    assert!(clsact(host)?.len() > 2, "{:?}", clsact(host)?);
    assert_eq!(reserved(host)?, "8080,10000-30100");
    tc(host, "filter add dev eth0 ingress pref 7 protocol ip u32 match u32 0 0")?;

    says(&cleanup(node, &[])?, "another agent is running")?;
    agent.kill9()?;
    let state = std::fs::read_dir(node.run_dir())?.next().context("a state file")??.path();
    std::fs::write(state.with_extension("new"), "half of a st")?;
    // Without any rights, nothing is half done. A task that needs a capability keeps its note.
    let nobody = ["--reuid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"];
    says(&cleanup(node, &nobody)?, "Permission denied")?;
    assert!(node.pin_dir().join("links").exists());
    says(
        &cleanup(node, &["--bounding-set=-all", "--inh-caps=-all"])?,
        "filters of eth0: Operation not permitted",
    )?;
    assert!(clsact(host)?.len() > 2, "{:?}", clsact(host)?);
    // Once with every right, and once with nothing to do.
    for _ in 0..2 {
        let output = cleanup(node, &[])?;
        ensure!(output.status.success(), "{output:?}");
        assert_eq!(clsact(host)?, ["eth0", "eth1"]);
        for direction in ["ingress", "egress"] {
            for device in ["eth0", "eth1"] {
                let filters = tc(host, &format!("filter show dev {device} {direction}"))?;
                assert_eq!(filters.contains("u32"), device == "eth0" && direction == "ingress", "{filters}");
                assert!(!filters.contains("edge_"), "{filters}");
            }
        }
        assert_eq!(reserved(host)?, "8080,29000-30100");
        assert!(!node.pin_dir().exists());
        assert_eq!(std::fs::read_dir(node.run_dir())?.count(), 0);
    }
    Ok(())
}

fn tc(host: &Place, line: &str) -> Result<String> {
    let mut tc = host.command("tc");
    tc.args(line.split(' '));
    tc.text()
}

fn clsact(host: &Place) -> Result<Vec<String>> {
    let all = tc(host, "qdisc show")?;
    let devices = all.lines().filter(|line| line.starts_with("qdisc clsact"));
    Ok(devices.filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
}

fn reserved(host: &Place) -> Result<String> {
    Ok(host
        .net()
        .enter(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports"))??
        .trim()
        .to_owned())
}

fn cleanup(node: &Node, rights: &[&str]) -> Result<Output> {
    let mut cleanup = node.host().command("setpriv");
    cleanup.args(rights).arg("--").arg(binary::proxy_agent()?).arg("cleanup");
    cleanup.arg("--pin-dir").arg(node.pin_dir()).arg("--run-dir").arg(node.run_dir());
    cleanup.output()
}

fn says(output: &Output, words: &str) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && text.contains(words), "{words:?} not in {text:?}");
    Ok(())
}

/// Returns a filter that returns `verdict` for packets with a source in `prefix` (`ADDRESS/LENGTH`), and passes on
/// everything else.
fn policy(prefix: &str, verdict: u32) -> Result<String> {
    let (address, length) = prefix.split_once('/').context("no prefix")?;
    let address = u32::from(address.parse::<std::net::Ipv4Addr>()?);
    let mask = u32::MAX << (32 - length.parse::<u32>()?);
    // The source of an IPv4 header is at offset 12; offsets from SKF_NET_OFF count from the IP header.
    let source = (-0x100000_i32 + 12).cast_unsigned();
    let pass_on = u32::MAX;
    Ok(format!("5,32 0 0 {source},84 0 0 {mask},21 0 1 {address},6 0 0 {verdict},6 0 0 {pass_on}"))
}

/// A world with a nodePort, and rules of others on the device that clients outside come by.
struct Ruled {
    world: World,
}

impl Ruled {
    const NODE_PORT: &str = "192.168.1.11:30123";
    const PODS: &str = "172.16.0.0/16";
    const SERVICE: &str = "192.168.1.11/32";

    /// Adds a filter on the way out of `eth0`.
    fn filter(&self, prefix: &str, verdict: u32) -> Result<()> {
        let mut tc = self.world.host().command("tc");
        tc.args("filter add dev eth0 egress pref 10 protocol ip bpf da bytecode".split(' '));
        tc.arg(policy(prefix, verdict)?);
        tc.text().map(drop)
    }

    fn unfilter(&self) -> Result<()> {
        let mut tc = self.world.host().command("tc");
        tc.args("filter del dev eth0 egress pref 10".split(' '));
        tc.text().map(drop)
    }

    /// Returns whether a client outside is served.
    fn is_served(&self) -> Result<bool> {
        let outside = self.world.outside();
        let attempt = outside.connect(Self::NODE_PORT).http();
        Ok(attempt.timeout(Duration::from_secs(5)).one()?.ok)
    }

    /// Waits until `status` shows these programs of others on `eth0`, and a problem of `object` or none.
    fn wait(&self, others: &[&str], object: &str, is_problem: bool) -> Result<()> {
        // After a change of the network, the agent looks at once.
        self.world.host().net().ip("link add type veth\n")?;
        let want = (others.iter().map(|&other| other.to_owned()).collect(), is_problem);
        until("status", || Ok((self.look(object)? == want).then_some(())))
            .with_context(|| format!("{object}: {:?}", self.look(object)))
    }

    /// Returns the programs of others on eth0, and whether the object is a problem.
    fn look(&self, object: &str) -> Result<(Vec<String>, bool)> {
        let status = self.world.tool(NODE, "status")?;
        let devices = status["agent"]["devices"].as_array().context("no devices")?;
        let eth0 = devices.iter().find(|device| device["name"] == "eth0").context("no eth0")?;
        let others = eth0["others"].as_array().context("no others")?;
        let others = others.iter().map(|other| ["what", "side", "direction"].map(|key| text(other, key)));
        let others = others.map(|words| words.join(" ")).collect();
        Ok((others, status["agent"]["problems"].get(object).is_some()))
    }
}

/// TC_ACT_OK and TC_ACT_SHOT of linux/pkt_cls.h.
const OK: u32 = 0;
const SHOT: u32 = 2;

/// TCX programs run before all filters. On the way out, filters of others see Services' addresses, and `status` says
/// so as long as that is so. With `--no-tcx`, our filters are behind the others, unless the others accept packets in
/// a way that no later filter gets them.
#[test]
fn what_filters_of_others_see_on_the_way_out() -> Result<()> {
    let mut ruled = Ruled { world: World::start(&["s08-nodeport.yaml"])? };
    ruled.wait(&[], "device eth0", false)?;
    assert!(ruled.is_served()?);
    let mut tc = ruled.world.host().command("tc");
    tc.args("qdisc add dev eth0 clsact".split(' '));
    tc.text()?;
    ruled.wait(&[], "device eth0", false)?;
    let filters = [(Ruled::PODS, SHOT), (Ruled::SERVICE, SHOT), (Ruled::PODS, OK)];

    for ((prefix, verdict), served) in filters.into_iter().zip([true, false, true]) {
        ruled.filter(prefix, verdict)?;
        ruled.wait(&["bpf filter, pref 10 behind egress"], "device eth0", true)?;
        assert_eq!(ruled.is_served()?, served, "TCX: {verdict} for {prefix}");
        let status = ruled.world.command(NODE, "status")?;
        let table = status.text()?;
        for told in ["bpf filter, pref 10 behind on egress", "device eth0: others are behind ours"] {
            assert!(table.contains(told), "{told}: {table}");
        }
        ruled.unfilter()?;
        ruled.wait(&[], "device eth0", false)?;
    }

    let mut agent = ruled.world.take_agent(NODE)?;
    agent.terminate()?;
    let manifests = ruled.world.manifests().dir().to_path_buf();
    let mut agent = ruled.world.new_agent(NODE)?.manifests(&manifests).flag("no-tcx", true);
    agent.start_ready()?;
    ruled.world.adopt(NODE, agent);
    for ((prefix, verdict), served) in filters.into_iter().zip([false, true, false]) {
        ruled.filter(prefix, verdict)?;
        ruled.wait(&["bpf filter, pref 10 ahead egress"], "device eth0", false)?;
        assert_eq!(ruled.is_served()?, served, "clsact: {verdict} for {prefix}");
        ruled.unfilter()?;
    }
    assert!(ruled.is_served()?);
    Ok(())
}

/// Replies meet the kernel's policies before their translation: policies for pods' addresses apply, policies for the
/// Service's do not.
#[test]
fn what_ipsec_policies_match() -> Result<()> {
    let ruled = Ruled { world: World::start(&["s08-nodeport.yaml"])? };
    let host = ruled.world.host().net();
    ruled.wait(&[], "IPsec", false)?;
    for (prefix, served) in [(Ruled::SERVICE, true), (Ruled::PODS, false)] {
        host.ip(&format!("xfrm policy add src {prefix} dst {OUTSIDE_ADDRESS}/32 dir out action block\n"))?;
        ruled.wait(&[], "IPsec", true)?;
        assert_eq!(ruled.is_served()?, served, "a policy for {prefix}");
        host.ip("xfrm policy flush\n")?;
        ruled.wait(&[], "IPsec", false)?;
        assert!(ruled.is_served()?);
    }
    Ok(())
}
