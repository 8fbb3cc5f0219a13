//! The Node, and the settings that the running agent takes from it.

use proxy_common::abi::maps;
use std::collections::BTreeMap;
use std::thread;
use std::time::Instant;

use proxy_tests::apiserver::Resource;

use super::*;

/// Returns a dual-stack Service with a nodePort, and its endpoints L1 and V1.
fn node_port_31080() -> Vec<Value> {
    let slice = |family: &str, address: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "namespace": "a", "name": format!("s-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "s"},
            },
            "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "nodeName": "n1", "conditions": {"ready": true}}],
        })
    };
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "a", "name": "s"},
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"name": "web", "port": 80, "protocol": "TCP", "nodePort": 31080}],
        },
    });
    vec![service, slice("IPv4", "10.64.1.11"), slice("IPv6", "fd00:64:0:1::11")]
}

/// Checks that the agent takes these IPs, the primary one first, from a Node with these addresses, and serves
/// nodePorts there and nowhere else.
fn node_ips_are(addresses: &[(&str, &str)], bind_address: &str, want: &[&str]) -> Result<()> {
    let setting = Setting::within(LabSpec::cases()?)?;
    for pod in ["L1", "V1"] {
        setting.lab.pod(pod).serve().tcp(8080).start()?;
    }
    let mut node = setting.node().object();
    node["status"]["addresses"] =
        addresses.iter().map(|(kind, address)| json!({"type": kind, "address": address})).collect();
    let items: Vec<Value> = [node].into_iter().chain(node_port_31080()).collect();
    setting.write(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    let mut agent = setting.with_manifests()?.flag("bind-address", bind_address);
    start(&mut agent)?;
    wait_ips(&agent, want)?;
    let x = setting.lab.client("X");
    for address in ["192.0.2.10", "198.51.100.10", "2001:db8:1::10", "2001:db8:2::10"] {
        let target = std::net::SocketAddr::new(address.parse()?, 31080);
        let attempt = x.connect(target).one()?;
        ensure!(attempt.ok == want.contains(&address), "{address}: {attempt:?}");
    }
    Ok(())
}

#[test]
fn p230_internal_ips_come_first() -> Result<()> {
    let node =
        [("ExternalIP", "203.0.113.50"), ("InternalIP", "192.0.2.10"), ("InternalIP", "2001:db8:1::10")];
    node_ips_are(&node, "0.0.0.0", &["192.0.2.10", "2001:db8:1::10"])
}

/// Addresses of the Node of two rows.
const IPV6_FIRST: [(&str, &str); 2] = [("InternalIP", "2001:db8:1::10"), ("InternalIP", "192.0.2.10")];

#[test]
fn p231_the_first_ip_is_primary() -> Result<()> {
    node_ips_are(&IPV6_FIRST, "0.0.0.0", &["2001:db8:1::10", "192.0.2.10"])
}

#[test]
fn p232_a_bind_address_overrides_and_is_primary() -> Result<()> {
    node_ips_are(&IPV6_FIRST, "198.51.100.10", &["198.51.100.10", "2001:db8:1::10"])
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
    // The agent follows the Node when it appears.
    server.apply(setting.node().object())?;
    wait_ips(&agent, &["192.0.2.10", "2001:db8:1::10"])?;
    ensure!(agent.log().contains("the node's IPs have changed"), "not told");

    // A start that knows the Node uses its IPs from the beginning.
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

    // The flag overrides the file, and a bind address overrides the Node.
    let config = setting.config("hostnameOverride: other\nbindAddress: 2001:db8:2::10\n")?;
    let mut agent = agent.flag("config", config.display());
    start(&mut agent)?;
    wait_ips(&agent, &["2001:db8:2::10", "192.0.2.10"])?;
    assert_eq!(agent.tool("status", &[])?["agent"]["node"], "node-a");
    Ok(())
}

/// Returns the keys of `POD_SOURCES`.
fn pod_sources(setting: &Setting) -> Result<Vec<String>> {
    let pins = proxy_agent::bpf::pins::PinDir::new(setting.node().pin_dir());
    let mut command = setting.node().host().command("bpftool");
    command.args(["-j", "map", "dump", "pinned"]).arg(pins.map(maps::POD_SOURCES));
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

    // Any other field of the Node may change.
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

/// Returns the samples of a metric, by line.
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
    // The server is given by its address alone, because it asks for no credentials.
    let mut agent = setting.agent()?.flag("master", server.url()).flag("iptables-sync-period", "1s");
    start(&mut agent)?;
    let endpoints = || -> Result<Value> { Ok(agent.tool("services", &[])?[0]["cluster"].clone()) };
    assert_eq!(endpoints()?, json!(["10.64.1.11:8080"]));
    let syncs = || -> Result<_> {
        let queued = samples(&agent, "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds")?;
        Ok((queued, samples(&agent, "kubeproxy_sync_proxy_rules_duration_seconds_count")?))
    };
    let full_syncs = || samples(&agent, "kubeproxy_sync_full_proxy_rules_duration_seconds_count");
    let full_before = full_syncs()?;
    let before = syncs()?;
    ensure!(before.0.len() == 2 && before.1.len() == 2, "{before:?}");

    let apply = |node: &Value| -> Result<()> {
        let since = Instant::now();
        server.apply(node.clone())?;
        until("the event", || Ok(server.event_sent(Resource::Nodes).filter(|sent| *sent > since)))?;
        // Long enough for an unwanted sync.
        thread::sleep(Duration::from_millis(300));
        Ok(())
    };
    node["metadata"]["labels"]["topology.kubernetes.io/region"] = "elsewhere".into();
    node["metadata"]["labels"]["kubernetes.io/hostname"] = "renamed".into();
    apply(&node)?;
    assert_eq!(syncs()?, before);
    // Nothing waits to be programmed; after twice the sync period, the probe would fail.
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
    let full_after = full_syncs()?;
    ensure!(full_after.len() == 2, "{full_after:?}");
    for (family, count) in &full_after {
        let (before, after): (f64, f64) = (full_before[family].parse()?, count.parse()?);
        assert_eq!(after, before + 1.0, "{family}");
    }

    // Without the label there is no zone, and no endpoint is filtered. The deletion of the Node changes nothing.
    node["metadata"]["labels"] = json!({});
    apply(&node)?;
    until("every endpoint", || Ok((endpoints()?.as_array().map(Vec::len) == Some(2)).then_some(())))?;
    let before = syncs()?;
    server.delete(&node)?;
    until("a word about it", || Ok(agent.log().contains("this Node is gone").then_some(())))?;
    assert_eq!(syncs()?, before);
    Ok(())
}
