//! kube-proxy's configuration, by file and by flags, and the Node, as the running agent takes them.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::{ApiServer, Resource};
use proxy_tests::lab::{Agent, Lab, LabSpec, Node, binary};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

/// However busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab without Services, and a directory for files. Agents run on `n1`.
struct Setting {
    lab: Lab,
    dir: TempDir,
}

impl Setting {
    fn new() -> Result<Self> {
        let setting = Self { lab: Lab::build(LabSpec::three_nodes()?)?, dir: tempfile::tempdir()? };
        fs::create_dir(setting.dir.path().join("manifests"))?;
        Ok(setting)
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    fn agent(&self) -> Result<Agent> {
        Ok(self.node().agent()?.flag("run-dir", self.dir.path().join("run").display()))
    }

    /// An agent that reads manifests.
    fn with_manifests(&self) -> Result<Agent> {
        Ok(self.agent()?.manifests(&self.dir.path().join("manifests")))
    }

    /// Puts an object into the manifests.
    fn write(&self, object: &Value) -> Result<()> {
        let new = self.dir.path().join("object.new");
        fs::write(&new, object.to_string())?;
        Ok(fs::rename(new, self.dir.path().join("manifests/object.json"))?)
    }

    /// Writes a configuration file with these fields.
    fn config(&self, fields: &str) -> Result<PathBuf> {
        let path = self.dir.path().join("config.conf");
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        fs::write(&path, format!("{head}{fields}"))?;
        Ok(path)
    }

    /// An API server that the node reaches, and its kubeconfig.
    fn api_server(&self) -> Result<(ApiServer, PathBuf)> {
        let listener = self.node().host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
        let server = ApiServer::start_on(listener)?;
        let kubeconfig = self.dir.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig)?;
        Ok((server, kubeconfig))
    }

    /// The answer of a server on the node.
    fn get(&self, address: &str, path: &str) -> Result<(u16, String)> {
        self.node().host().http_get(address.parse()?, path)
    }

    /// What `/configz` shows.
    fn configz(&self, address: &str) -> Result<Value> {
        let (status, body) = self.get(address, "/configz")?;
        ensure!(status == 200, "{status}: {body}");
        Ok(serde_json::from_str::<Value>(&body)?["kubeproxy.config.k8s.io"].clone())
    }
}

fn start(agent: &mut Agent) -> Result<()> {
    agent.start()?;
    agent.wait_ready(PATIENCE)
}

/// Waits until `status` shows these IPs of the node, the primary one first.
fn wait_ips(agent: &Agent, want: &[&str]) -> Result<()> {
    until("the node's IPs", || {
        let status = agent.tool("status", &[])?;
        Ok((status["agent"]["node_ips"] == json!(want)).then_some(()))
    })
}

/// Waits for an answer of `/readyz` that has `text`.
fn wait_not_ready(agent: &Agent, text: &str) -> Result<()> {
    until(text, || {
        let answer = agent.get("/readyz").ok();
        Ok(answer.is_some_and(|(status, body)| status == 503 && body.contains(text)).then_some(()))
    })
}

/// Waits for the end of `agent`, which has to be an error with these words.
fn ends_with(mut agent: Agent, words: &[&str]) -> Result<()> {
    let status = agent.wait_end(PATIENCE)?;
    let log = agent.quiet().log();
    let error = log.lines().rfind(|line| line.starts_with("error: ")).context("no error in the log")?;
    ensure!(status.code() == Some(1), "{status}: {log}");
    ensure!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error}");
    Ok(())
}

#[test]
fn p233_a_node_that_is_absent() -> Result<()> {
    let setting = Setting::new()?;
    let (server, kubeconfig) = setting.api_server()?;
    let mut agent = setting.agent()?.kubeconfig(&kubeconfig);
    let start = Instant::now();
    agent.start()?;
    wait_not_ready(&agent, "the Node has not appeared with an IP")?;
    agent.wait_ready(2 * PATIENCE)?;
    ensure!(start.elapsed().as_secs() >= 29, "ready after {:?}", start.elapsed());
    wait_ips(&agent, &["127.0.0.1", "::1"])?;
    // When it comes, it counts.
    server.apply(setting.node().object())?;
    wait_ips(&agent, &["192.0.2.10", "2001:db8:1::10"])?;
    ensure!(agent.log().contains("the node's IPs have changed"), "not told");

    // A start that knows the Node works with its IPs from the beginning.
    agent.kill9()?;
    let before = agent.log().len();
    agent.start()?;
    agent.wait_ready(PATIENCE)?;
    let log = agent.log().split_off(before);
    ensure!(
        log.contains("node IPs ipv4=192.0.2.10 ipv6=2001:db8:1::10") && !log.contains("127.0.0.1 "),
        "{log}"
    );
    Ok(())
}

#[test]
fn p234_the_name_of_the_node() -> Result<()> {
    let setting = Setting::new()?;
    let mut object = setting.node().object();
    object["metadata"]["name"] = "node-a".into();
    setting.write(&object)?;
    let mut agent = setting.with_manifests()?.flag("hostname-override", "  Node-A ");
    start(&mut agent)?;
    wait_ips(&agent, &["192.0.2.10", "2001:db8:1::10"])?;
    assert_eq!(agent.tool("status", &[])?["agent"]["node"], "node-a");
    agent.terminate()?;

    // The flag wins over the file, and a bind address over the Node.
    let config = setting.config("hostnameOverride: other\nbindAddress: 2001:db8:2::10\n")?;
    let mut agent = agent.flag("config", config.display());
    start(&mut agent)?;
    wait_ips(&agent, &["2001:db8:2::10", "192.0.2.10"])?;
    assert_eq!(agent.tool("status", &[])?["agent"]["node"], "node-a");
    Ok(())
}

#[test]
fn p235_an_empty_file() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    let configz = setting.configz("127.0.0.1:10249")?;
    for (pointer, want) in [
        ("/healthzBindAddress", json!("0.0.0.0:10256")),
        ("/metricsBindAddress", json!("127.0.0.1:10249")),
        ("/iptables/masqueradeBit", json!(14)),
        ("/nftables/syncPeriod", json!("30s")),
        ("/nftables/minSyncPeriod", json!("1s")),
        ("/configSyncPeriod", json!("15m0s")),
        ("/clientConnection/qps", json!(5.0)),
        ("/clientConnection/burst", json!(10)),
        ("/oomScoreAdj", json!(-999)),
        ("/conntrack/maxPerCore", json!(32768)),
        ("/conntrack/min", json!(131_072)),
        ("/conntrack/tcpEstablishedTimeout", json!("24h0m0s")),
        ("/conntrack/tcpCloseWaitTimeout", json!("1h0m0s")),
    ] {
        assert_eq!(configz.pointer(pointer), Some(&want), "{pointer}");
    }
    assert_eq!(setting.get("192.0.2.10:10256", "/livez")?.0, 200);
    assert!(setting.get("192.0.2.10:10249", "/configz").is_err(), "metrics are for this host only");
    let log = agent.log();
    // The lab's flags for what the file is to say, but not those that kube-proxy does not have.
    let ignored = "--cluster-cidr, --healthz-bind-address, --metrics-bind-address: ignored";
    ensure!(log.contains(ignored) && !log.contains("without effect"), "{log}");
    Ok(())
}

#[test]
fn p236_an_ipv6_bind_address() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("bindAddress: '::'\n")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    let configz = setting.configz("[::1]:10249")?;
    assert_eq!(configz["healthzBindAddress"], "[::]:10256");
    assert_eq!(configz["metricsBindAddress"], "[::1]:10249");
    for address in ["[2001:db8:1::10]:10256", "192.0.2.10:10256"] {
        assert_eq!(setting.get(address, "/livez")?.0, 200, "{address}");
    }
    assert!(setting.get("127.0.0.1:10249", "/healthz").is_err());
    Ok(())
}

/// The agent must not start with these fields in its file, nor with this flag: it names both and the value.
fn refused(fields: &str, flags: &[&str], words: &[&str]) -> Result<()> {
    let setting = Setting::new()?;
    let config = format!("--config={}", setting.config(fields)?.display());
    for args in [&[config.as_str()][..], flags] {
        let mut command = setting.node().host().command(binary::proxy_agent()?);
        command.arg("run").arg("--pin-dir").arg(setting.node().pin_dir()).args(args);
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{}: {log}", output.status);
        let error = log.lines().find(|line| line.starts_with("error: ")).context("no error")?;
        ensure!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error}");
        ensure!(!setting.node().pin_dir().exists(), "nothing is done");
    }
    Ok(())
}

#[test]
fn p237_primary_beside_a_cidr() -> Result<()> {
    refused(
        "nodePortAddresses: [primary, 192.0.2.0/24]\n",
        &["--nodeport-addresses=primary,192.0.2.0/24"],
        &["nodePortAddresses", "--nodeport-addresses", "`primary`", "`192.0.2.0/24`"],
    )
}

#[test]
fn p238_a_pause_longer_than_the_period() -> Result<()> {
    refused(
        "nftables: {minSyncPeriod: 40s, syncPeriod: 30s}\nmode: nftables\n",
        &["--proxy-mode=nftables", "--iptables-min-sync-period=40s", "--iptables-sync-period=30s"],
        &["nftables.minSyncPeriod", "--iptables-min-sync-period", "`40s`", "30s"],
    )
}

#[test]
fn p239_a_bit_that_a_mark_does_not_have() -> Result<()> {
    refused(
        "iptables: {masqueradeBit: 32}\n",
        &["--iptables-masquerade-bit=32"],
        &["iptables.masqueradeBit", "--iptables-masquerade-bit", "`32`", "0 to 31"],
    )
}

#[test]
fn p240_interfaces_without_a_name() -> Result<()> {
    refused(
        "detectLocalMode: InterfaceNamePrefix\n",
        &["--detect-local-mode=InterfaceNamePrefix"],
        &["detectLocal.interfaceNamePrefix", "--pod-interface-name-prefix", "``"],
    )
}

#[test]
fn p241_two_cluster_cidrs_of_one_family() -> Result<()> {
    refused(
        "clusterCIDR: 10.64.0.0/12,10.80.0.0/12\n",
        &["--cluster-cidr=10.64.0.0/12,10.80.0.0/12"],
        &["clusterCIDR", "--cluster-cidr", "`10.64.0.0/12,10.80.0.0/12`"],
    )
}

/// The keys of `POD_SOURCES`.
fn pod_sources(setting: &Setting) -> Result<Vec<String>> {
    let pins = proxy_agent::bpf::pins::PinDir::new(setting.node().pin_dir());
    let mut command = setting.node().host().command("bpftool");
    command.args(["-j", "map", "dump", "pinned"]).arg(pins.map("POD_SOURCES"));
    let elements: Vec<Value> = serde_json::from_str(&command.text()?)?;
    Ok(elements.iter().map(|element| element["key"].to_string()).collect())
}

#[test]
fn p242_pod_cidrs_that_change() -> Result<()> {
    let setting = Setting::new()?;
    let mut object = setting.node().object();
    let cidrs = std::mem::take(&mut object["spec"]);
    setting.write(&object)?;
    let mut agent = setting.with_manifests()?.flag("detect-local-mode", "NodeCIDR").without("cluster-cidr");
    agent.start()?;
    wait_not_ready(&agent, "the Node has not appeared with podCIDRs")?;
    object["spec"] = cidrs;
    setting.write(&object)?;
    agent.wait_ready(PATIENCE)?;
    assert_eq!(pod_sources(&setting)?.len(), 2);

    // Anything else of the Node may change.
    object["metadata"]["labels"]["topology.kubernetes.io/zone"] = "zb".into();
    object["status"]["addresses"][0]["address"] = "192.0.2.11".into();
    setting.write(&object)?;
    wait_ips(&agent, &["192.0.2.11", "2001:db8:1::10"])?;

    object["spec"]["podCIDRs"] = json!(["10.64.9.0/24", "fd00:64:0:1::/64"]);
    setting.write(&object)?;
    ends_with(agent, &["podCIDRs have changed", "10.64.1.0/24", "10.64.9.0/24"])?;
    assert_eq!(pod_sources(&setting)?.len(), 2, "the dataplane stays in place");
    Ok(())
}

/// Samples of a metric, by line.
fn samples(agent: &Agent, name: &str) -> Result<BTreeMap<String, String>> {
    let text = agent.metrics()?;
    let lines = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.split_once(' '));
    Ok(lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

#[test]
fn p243_of_the_labels_only_the_zone_counts() -> Result<()> {
    let setting = Setting::new()?;
    let (server, _) = setting.api_server()?;
    let mut node = setting.node().object();
    server.apply(node.clone())?;
    server.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "a", "name": "s"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
                 "ports": [{"name": "web", "port": 80, "protocol": "TCP"}]},
    }))?;
    let endpoint = |address: &str, zone: &str| json!({"addresses": [address], "conditions": {"ready": true}, "hints": {"forZones": [{"name": zone}]}});
    server.apply(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "a", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
        "endpoints": [endpoint("10.64.1.11", "za"), endpoint("10.64.2.21", "zb")],
    }))?;
    // The server by its address alone: it asks for no credentials.
    let mut agent = setting.agent()?.flag("master", server.url()).flag("iptables-sync-period", "1s");
    start(&mut agent)?;
    let endpoints = || -> Result<Value> { Ok(agent.tool("services", &[])?[0]["cluster"].clone()) };
    assert_eq!(endpoints()?, json!(["10.64.1.11:8080"]));
    let syncs = || -> Result<_> {
        let queued = samples(&agent, "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds")?;
        Ok((queued, samples(&agent, "kubeproxy_sync_proxy_rules_duration_seconds_count")?))
    };
    let before = syncs()?;
    ensure!(before.0.len() == 2 && before.1.len() == 2, "{before:?}");

    let apply = |node: &Value| -> Result<()> {
        let since = Instant::now();
        server.apply(node.clone())?;
        until("the event", || Ok(server.event_sent(Resource::Nodes).filter(|sent| *sent > since)))?;
        // Long enough for a sync that must not be.
        thread::sleep(Duration::from_millis(300));
        Ok(())
    };
    node["metadata"]["labels"]["topology.kubernetes.io/region"] = "elsewhere".into();
    node["metadata"]["labels"]["kubernetes.io/hostname"] = "renamed".into();
    apply(&node)?;
    assert_eq!(syncs()?, before);
    // Nothing waits: after twice the sync period it would be too long.
    thread::sleep(Duration::from_millis(2200));
    assert_eq!(agent.get("/livez")?.0, 200);
    assert_eq!(syncs()?, before);

    node["metadata"]["labels"]["topology.kubernetes.io/zone"] = "zb".into();
    apply(&node)?;
    until("the endpoint of the other zone", || {
        Ok((endpoints()? == json!(["10.64.2.21:8080"])).then_some(()))
    })?;
    let after = syncs()?;
    assert!(after.0.values().zip(before.0.values()).all(|(after, before)| after != before), "{after:?}");
    assert!(after.1.values().zip(before.1.values()).all(|(after, before)| after != before), "{after:?}");

    // Without the label there is no zone, and nothing is filtered; a Node that is gone changes nothing.
    node["metadata"]["labels"] = json!({});
    apply(&node)?;
    until("every endpoint", || Ok((endpoints()?.as_array().map(Vec::len) == Some(2)).then_some(())))?;
    let before = syncs()?;
    server.delete(&node)?;
    until("a word about it", || Ok(agent.log().contains("this Node is gone").then_some(())))?;
    assert_eq!(syncs()?, before);
    Ok(())
}

#[test]
fn p244_a_file_that_is_rewritten() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("mode: nftables\n")?;
    let mut agent = setting.with_manifests()?.flag("config", config.display());
    start(&mut agent)?;
    ensure!(agent.log().contains("without effect here: mode=nftables"), "not told");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(agent.get("/readyz")?.0, 200);
    setting.config("mode: nftables\n")?;
    ends_with(agent, &["configuration file", &config.display().to_string(), "has changed"])?;
    assert!(setting.node().pin_dir().join("links").exists(), "the dataplane stays in place");
    Ok(())
}

#[test]
fn kube_proxys_command_line_works_as_it_is() -> Result<()> {
    let setting = Setting::new()?;
    let (server, kubeconfig) = setting.api_server()?;
    server.apply(setting.node().object())?;
    let config = setting.config(&format!(
        "clientConnection: {{kubeconfig: {}, qps: 0}}\nclusterCIDR: 10.64.0.0/12\noomScoreAdj: 500\nmode: ''\nconntrack: \
         {{maxPerCore: null, min: null}}\nnodePortAdresses: []\n",
        kubeconfig.display()
    ))?;
    let mut agent = setting.agent()?.bare().flag("config", config.display()).without("cluster-cidr");
    start(&mut agent)?;
    let pid = agent.id().context("it runs")?;
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim(), "500");
    let log = agent.log();
    ensure!(log.contains("there is no field `nodePortAdresses`"), "{log}");
    let source = agent.tool("status", &[])?["agent"]["source"].clone();
    assert_eq!(source, format!("Kubernetes API ({})", kubeconfig.display()));
    agent.terminate()?;

    let mut cleanup = setting.node().host().command(binary::proxy_agent()?);
    cleanup.args(["--cleanup", "--run-dir"]).arg(setting.dir.path().join("run"));
    cleanup.arg("--pin-dir").arg(setting.node().pin_dir());
    cleanup.text()?;
    assert!(!setting.node().pin_dir().exists());
    Ok(())
}

#[test]
fn an_address_that_is_taken() -> Result<()> {
    let setting = Setting::new()?;
    let taken = setting.node().host().net().enter(|| TcpListener::bind("127.0.0.1:10249"))??;
    let mut agent = setting.with_manifests()?.flag("bind-address-hard-fail", true);
    agent.start()?;
    ends_with(agent, &["cannot listen on 127.0.0.1:10249 for metrics"])?;

    let mut agent = setting.with_manifests()?;
    start(&mut agent)?;
    ensure!(agent.log().contains("cannot listen"), "not told");
    drop(taken);
    until("the metrics", || Ok(agent.metrics().ok()))?;
    Ok(())
}

#[test]
fn a_host_without_ipv6() -> Result<()> {
    let setting = Setting::new()?;
    let mut switch = setting.node().host().command("sh");
    switch.args(["-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"]);
    switch.text()?;
    let mut agent = setting.with_manifests()?.flag("cluster-cidr", "fd00:64::/48");
    agent.start()?;
    ends_with(agent, &["clusterCIDR", "fd00:64::/48", "IPv6, which is switched off"])?;

    let mut node = setting.node().object();
    setting.write(&node)?;
    let mut agent = setting.with_manifests()?;
    start(&mut agent)?;
    let status: Value = serde_json::from_str(&agent.get("/livez")?.1)?;
    let families: Vec<&String> = status["status"].as_object().context("a status")?.keys().collect();
    assert_eq!(families, ["IPv4"]);
    assert!(agent.log().contains("`fd00:64::/48` is IPv6, which is switched off"), "not told");
    agent.terminate()?;

    node["status"]["addresses"].as_array_mut().context("addresses")?.reverse();
    setting.write(&node)?;
    agent.start()?;
    ends_with(agent, &["primary IP 2001:db8:1::10", "IPv6, which is switched off"])
}

#[test]
fn what_needs_full_root_is_done_beforehand() -> Result<()> {
    let setting = Setting::new()?;
    let mut init = setting.node().host().command(binary::proxy_agent()?);
    init.args(["--init-only", "--pin-dir"]).arg(setting.node().pin_dir());
    init.text()?;
    assert!(setting.node().pin_dir().is_dir());
    let mut reserved = setting.node().host().command("cat");
    reserved.arg("/proc/sys/net/ipv4/ip_local_reserved_ports");
    assert_eq!(reserved.text()?.trim(), "10000-29999");
    Ok(())
}

#[test]
fn the_log_as_json() -> Result<()> {
    let setting = Setting::new()?;
    let config = setting.config("logging: {format: text, verbosity: 6}\n")?;
    let mut agent = setting
        .with_manifests()?
        .flag("config", config.display())
        .flag("logging-format", "json")
        .flag("v", 0);
    start(&mut agent)?;
    agent.terminate()?;
    for line in agent.log().lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        assert!(["INFO", "WARN"].contains(&line["level"].as_str().unwrap_or_default()), "{line}");
    }
    Ok(())
}

#[test]
fn a_configuration_is_written_and_read_back() -> Result<()> {
    let setting = Setting::new()?;
    let written = setting.dir.path().join("written.conf");
    let mut write = setting.node().host().command(binary::proxy_agent()?);
    write.args([
        "--nodeport-addresses=192.0.2.0/24,2001:db8::/32",
        "--masquerade-all",
        "--iptables-sync-period=1h30m",
    ]);
    write.arg("--write-config-to").arg(&written);
    write.text()?;
    let mut agent = setting.with_manifests()?.flag("config", written.display());
    start(&mut agent)?;
    let configz = setting.configz("127.0.0.1:10249")?;
    assert_eq!(configz["nodePortAddresses"], json!(["192.0.2.0/24", "2001:db8::/32"]));
    assert_eq!(configz["nftables"]["masqueradeAll"], true);
    assert_eq!(configz["iptables"]["syncPeriod"], "1h30m0s");
    ensure!(!agent.log().contains("there is no field"), "it wrote what it does not know");
    Ok(())
}
