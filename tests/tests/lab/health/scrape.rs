//! Scrapes of the running agent.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use proxy_common::abi::Counter;
use proxy_common::abi::maps;
use proxy_tests::apiserver::{Resource, Verb};
use proxy_tests::lab::HttpAnswer;
use proxy_tests::scenarios::until;
use serde_json::json;

use super::*;

fn get(stage: &Stage, path: &str, headers: &[(&str, &str)]) -> Result<HttpAnswer> {
    stage.host().http("127.0.0.1:10249".parse()?, path, headers)
}

#[test]
fn either_text_format_is_served() -> Result<()> {
    let stage = Stage::new()?;
    stage.write(&[service("s", "10.96.0.10", &json!({})), slice("s", "IPv4", &["L1"])])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;

    let plain = get(&stage, "/metrics", &[])?;
    assert_eq!(plain.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let open =
        get(&stage, "/metrics", &[("Accept", "application/openmetrics-text;version=1.0.0,*/*;q=0.1")])?;
    assert_eq!(
        open.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    ensure!(open.body.ends_with("\n# EOF\n") && !plain.body.contains("# EOF"), "the end");
    // Both forms have the same samples, each described just before it.
    assert_eq!(names(&plain.body), names(&open.body));
    let docs = include_str!("../../../../docs/metrics.md");
    let mut described = BTreeSet::new();
    let mut last = "";
    for line in plain.body.lines() {
        if let Some(text) = line.strip_prefix("# TYPE ") {
            last = text.split(' ').next().unwrap_or_default();
            ensure!(described.insert(last), "{last} is described twice");
            ensure!(docs.contains(&format!("| `{last}` |")), "{last} is not in docs/metrics.md");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            let parts = ["_bucket", "_sum", "_count"].map(|part| name.strip_suffix(part));
            ensure!(name == last || parts.contains(&Some(last)), "{line} after the description of {last}");
        }
    }
    for (path, body) in [("/healthz", "ok"), ("/proxyMode", "ebpf")] {
        let answer = get(&stage, path, &[])?;
        assert_eq!((answer.status, &*answer.body), (200, body), "{path}");
    }
    Ok(())
}

fn names(text: &str) -> BTreeSet<String> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
}

#[test]
fn what_every_component_of_kubernetes_has() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = stage.with_api()?;
    server.fail(Some(Verb::Watch), Some(Resource::Services), 500, 1);
    let mut agent = agent.flag("feature-gates", "AllowServiceExternalIPs=false");
    start(&mut agent)?;
    // Four lists that continue as watches; the Event of the start.
    until("lists and watches", || Ok((requests(&agent, "200", "GET")? >= 4.0).then_some(())))?;
    until("an Event", || Ok((requests(&agent, "201", "POST")? >= 1.0).then_some(())))?;
    assert_eq!(requests(&agent, "500", "GET")?, 1.0);
    let took = "rest_client_request_duration_seconds_count{verb=\"GET\",host=\"127.0.0.1:6443\"}";
    assert!(sample(&agent, took)? >= 5.0);
    // A watch has no size, and the body of a GET is almost empty; the request and response of an Event have a size.
    for (direction, verb) in [("request", "GET"), ("request", "POST"), ("response", "POST")] {
        let sum =
            format!("rest_client_{direction}_size_bytes_sum{{verb=\"{verb}\",host=\"127.0.0.1:6443\"}}");
        let bytes = sample(&agent, &sum)?;
        assert_eq!(bytes > 100.0, verb == "POST", "{sum} is {bytes}");
    }
    let gate = "kubernetes_feature_enabled{name=\"AllowServiceExternalIPs\",stage=\"DEPRECATED\"}";
    assert_eq!(samples(&agent, gate)?.into_values().collect::<Vec<_>>(), [0.0]);
    server.go_away();
    until("no answer", || Ok((requests(&agent, "<error>", "GET")? >= 1.0).then_some(())))?;

    ensure!(!get(&stage, "/metrics/slis", &[])?.body.contains("name=\"ping\""), "nobody has asked");
    assert_eq!(get(&stage, "/healthz", &[])?.status, 200);
    assert_eq!(agent.get("/livez")?.0, 200);
    let body = get(&stage, "/metrics/slis", &[])?.body;
    for line in [
        "# TYPE kubernetes_healthcheck gauge",
        "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1",
        "# TYPE kubernetes_healthchecks_total counter",
        "kubernetes_healthchecks_total{name=\"ping\",type=\"healthz\",status=\"success\"} 1",
        "kubernetes_healthcheck{name=\"proxy\",type=\"livez\"} 1",
        "kubernetes_healthchecks_total{name=\"proxy\",type=\"livez\",status=\"success\"} 1",
    ] {
        ensure!(body.lines().any(|other| other == line), "{line} not in {body}");
    }
    Ok(())
}

fn requests(agent: &Agent, code: &str, method: &str) -> Result<f64> {
    sample(
        agent,
        &format!("rest_client_requests_total{{code=\"{code}\",method=\"{method}\",host=\"127.0.0.1:6443\"}}"),
    )
}

#[test]
fn maps_verdicts_and_sweeps_are_counted() -> Result<()> {
    let stage = Stage::new()?;
    let pod = stage.lab.pod("L1");
    pod.serve().udp(8080).start()?;
    let mut service = service("s", "10.96.0.10", &json!({"sessionAffinity": "ClientIP"}));
    service["spec"]["ports"][0]["protocol"] = "UDP".into();
    stage.write(&[service.clone(), udp_slice("L1")])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;

    let mut all: BTreeSet<String> = [
        maps::FRONTENDS,
        maps::SERVICES,
        maps::SLOTS,
        maps::BACKENDS,
        maps::SOURCE_RANGES,
        maps::LOCAL_ADDRESSES,
        maps::SERVICE_CIDRS,
        maps::POD_SOURCES,
        maps::DEVICES,
        maps::FLOWS,
        maps::FLOW_INDEX,
        maps::NEW_FLOWS,
        maps::NEW_FLOW_INDEX,
        maps::AFFINITY,
        maps::NEW_AFFINITY,
        maps::UDP_FLOWS,
        maps::FRAGMENTS,
        maps::STREAMS,
    ]
    .map(str::to_owned)
    .into();
    assert_eq!(maps_with(&agent, "capacity")?, all);
    all.remove(maps::STREAMS);
    assert_eq!(maps_with(&agent, "entries")?, all);
    // The set of the cluster and the set of this node.
    assert_eq!((entries(&agent, maps::SERVICES)?, entries(&agent, maps::SLOTS)?), (1.0, 2.0));
    assert!(entries(&agent, maps::DEVICES)? >= 2.0 && entries(&agent, maps::LOCAL_ADDRESSES)? >= 4.0);
    assert_eq!(samples(&agent, "vipr_verdicts_total")?.len(), Counter::ALL.len());

    let connected = "vipr_verdicts_total{verdict=\"connected\"}";
    let before = sample(&agent, connected)?;
    let p = stage.lab.pod("P");
    let mut held = p.hold("10.96.0.10:80").udp().open()?;
    assert!(held.say("one")?.ok);
    ensure!(p.connect("10.96.0.10:80").udp_unconnected().one()?.ok, "a datagram");
    assert_eq!(sample(&agent, connected)?, before + 1.0);
    // Counted every few seconds.
    wait_sample(&agent, "vipr_map_entries{map=\"AFFINITY\"}", |entries| entries > 0.0)?;
    // The first VIP of a socket is in the socket's own storage.
    assert_eq!(sample(&agent, "vipr_map_entries{map=\"UDP_FLOWS\"}")?, 0.0);

    let deleted = "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"}";
    assert_eq!(sample(&agent, deleted)?, 0.0);
    stage.write(&[service, udp_slice("R1")])?;
    wait_sample(&agent, deleted, |deleted| deleted == 1.0)?;
    until("the end of the socket", || Ok((!held.say("two")?.ok).then_some(())))?;
    let sweeps = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv6\"}";
    assert!(sample(&agent, sweeps)? >= 2.0, "one at the start, one for the backend that left");
    Ok(())
}

fn entries(agent: &Agent, map: &str) -> Result<f64> {
    sample(agent, &format!("vipr_map_entries{{map=\"{map}\"}}"))
}

fn maps_with(agent: &Agent, name: &str) -> Result<BTreeSet<String>> {
    let samples = samples(agent, &format!("vipr_map_{name}{{map=\""))?;
    Ok(samples.keys().filter_map(|sample| Some(sample.split('"').nth(1)?.to_owned())).collect())
}

fn udp_slice(endpoint: &str) -> Value {
    let mut slice = slice("s", "IPv4", &[endpoint]);
    slice["ports"][0]["protocol"] = "UDP".into();
    slice
}
