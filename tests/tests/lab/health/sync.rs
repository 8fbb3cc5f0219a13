//! Syncs of the agent: their times, their extent, and the metrics of them.

use std::thread;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::writable::WritableMaps;
use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::{FrontendKey, FrontendValue, ServiceId, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_tests::apiserver::{ApiServer, Resource};
use proxy_tests::lab::Summary;
use proxy_tests::scenarios::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::*;

const CIP: &str = "10.96.0.10:80";
/// Time in which an unwanted event would have happened.
const A_WHILE: Duration = Duration::from_millis(400);

/// Returns the number of syncs: `full_`, `partial_`, or all of them.
fn syncs(agent: &Agent, kind: &str) -> Result<f64> {
    sample(agent, &format!("kubeproxy_sync_{kind}proxy_rules_duration_seconds_count{{ip_family=\"IPv4\"}}"))
}

/// Waits until no more syncs are counted.
fn settle(agent: &Agent) -> Result<()> {
    until("the end of syncs", || {
        let before = syncs(agent, "")?;
        thread::sleep(A_WHILE);
        Ok((syncs(agent, "")? == before).then_some(()))
    })
}

/// Returns Service `s` with this port, in namespace `a`.
fn with_port(port: u16) -> Value {
    service("s", "10.96.0.10", &json!({"ports": [{"name": "web", "port": port, "protocol": "TCP"}]}))
}

/// Returns the names of the Services that are programmed.
fn programmed(agent: &Agent) -> Result<Vec<String>> {
    let services = agent.tool("services", &[])?;
    let names = services.as_array().into_iter().flatten();
    Ok(names.filter_map(|port| Some(port["name"].as_str()?.to_owned())).collect())
}

fn wait_port(stage: &Stage, port: u16) -> Result<()> {
    let target = format!("10.96.0.10:{port}");
    until(&target, || Ok(stage.lab.pod("P").connect(&target).one()?.ok.then_some(())))
}

/// Returns an API server with Service `s` and endpoint L1, which serves, and an agent that is ready and quiet.
fn with_s(stage: &Stage) -> Result<(ApiServer, Agent)> {
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    let (server, mut agent) = stage.with_api()?;
    server.apply_all([with_port(80), slice("s", "IPv4", &["L1"])])?;
    start(&mut agent)?;
    settle(&agent)?;
    Ok((server, agent))
}

#[test]
fn p210_p211_the_first_sync_waits_for_every_list() -> Result<()> {
    let stage = Stage::new()?;
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    let (server, mut agent) = stage.with_api()?;
    server.apply_all([with_port(80), slice("s", "IPv4", &["L1"])])?;
    let p = stage.lab.pod("P");
    for restart in [false, true] {
        server.hold_list(Resource::EndpointSlices);
        server.forget_requests();
        agent.start()?;
        until("the list of Services", || Ok((server.lists(Resource::Services) > 0).then_some(())))?;
        thread::sleep(A_WHILE);
        assert_eq!(syncs(&agent, "")?, 0.0);
        // Either nothing is programmed, or the earlier state stays in force.
        assert_eq!(p.connect(CIP).one()?.ok, restart);
        assert!(matches!(agent.get("/readyz"), Ok((503, _))));

        let released = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        server.release_list(Resource::EndpointSlices);
        let last = "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}";
        // Only the first sync: the packet edge is ready some seconds later.
        let first = until("the first sync", || Ok(Some(sample(&agent, last)?).filter(|time| *time > 0.0)))?;
        let after = first - released;
        ensure!((0.0..10.0).contains(&after), "not at once, but after {after} s; a period has 30 s");
        agent.wait_ready(PATIENCE)?;
        assert!(p.connect(CIP).one()?.ok);
        assert_eq!(syncs(&agent, "full_")?, 1.0, "all lists in one sync");
        agent.kill9()?;
    }
    Ok(())
}

/// There is no pause between syncs: a change does not wait, and no change is lost in a burst.
#[test]
fn p212_changes_are_programmed_at_once() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let before = syncs(&agent, "")?;
    server.apply(with_port(81))?;
    wait_port(&stage, 81)?;
    for port in 82..87 {
        let start = Instant::now();
        server.apply(with_port(port))?;
        wait_port(&stage, port)?;
        thread::sleep(Duration::from_millis(200).saturating_sub(start.elapsed()));
    }
    settle(&agent)?;
    assert_eq!(syncs(&agent, "")? - before, 6.0);

    let before = syncs(&agent, "")?;
    for port in 1000..1200 {
        server.apply(with_port(port))?;
    }
    wait_port(&stage, 1199)?;
    settle(&agent)?;
    let made = syncs(&agent, "")? - before;
    ensure!((1.0..=200.0).contains(&made), "{made} syncs");
    assert!(!stage.lab.pod("P").connect("10.96.0.10:1198").one()?.ok, "the last change counts");
    assert_eq!(sample(&agent, "kubeproxy_sync_proxy_rules_service_changes_pending")?, 0.0);
    Ok(())
}

/// Fills `FRONTENDS` with elements of no Service, until no more fit.
fn fill_frontends(stage: &Stage) -> Result<u32> {
    let mut maps = WritableMaps::open(&PinDir::new(stage.node().pin_dir()))?;
    for number in 0..=maps.capacity().frontends {
        let [_, _, high, low] = number.to_be_bytes();
        let key = FrontendKey::exact(Addr::v4([203, 0, high, low]), Be16::new(1), proto::TCP);
        let value = FrontendValue { service: ServiceId::NONE, flags: 0, check: key.check() };
        if maps.apply(&Op::Frontend(key, Some(value))).is_err() {
            return Ok(number);
        }
    }
    anyhow::bail!("the map is never full")
}

#[test]
fn p213_a_sync_that_fails_is_made_again_in_full() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let (full, failures) = (syncs(&agent, "full_")?, sample(&agent, "vipr_sync_failures_total")?);
    ensure!(fill_frontends(&stage)? > 1000, "the map was full already");
    let start = Instant::now();
    server.apply_all([service("t", "10.96.0.20", &json!({})), slice("t", "IPv4", &["L1"])])?;
    until("t", || Ok(stage.lab.pod("P").connect("10.96.0.20:80").one()?.ok.then_some(())))?;
    // One second later, or one period later if that is shorter.
    ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    settle(&agent)?;
    assert_eq!(sample(&agent, "vipr_sync_failures_total")? - failures, 1.0);
    assert_eq!(syncs(&agent, "full_")? - full, 1.0);
    assert!(sample(&agent, "vipr_map_entries{map=\"FRONTENDS\"}")? < 100.0, "what nobody knows is gone");
    // Success ends the retries.
    thread::sleep(Duration::from_secs(2));
    assert_eq!(syncs(&agent, "full_")? - full, 1.0);
    assert_eq!(agent.get("/livez")?.0, 200);
    Ok(())
}

#[test]
fn p214_what_comes_and_goes_together_is_not_programmed() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let operations =
        || -> Result<f64> { Ok(samples(&agent, "vipr_map_operations_total")?.into_values().sum()) };
    let seen = "kubeproxy_sync_proxy_rules_service_changes_total";
    let (made, before) = (operations()?, sample(&agent, seen)?);
    let id = agent.id().context("the agent does not run")?;
    let id = Pid::from_raw(id.cast_signed()).context("a process id")?;
    let mut t = service("t", "10.96.0.20", &json!({}));
    let revision = server.apply_silently(t.clone())?;
    assert!(server.delete_silently(Resource::Services, "a", "t"));
    // Both events are in one chunk, which waits in the agent's socket, so the agent cannot program in between.
    let events = [("ADDED", revision), ("DELETED", revision + 1)].map(|(event, revision)| {
        t["metadata"]["resourceVersion"] = revision.to_string().into();
        format!(r#"{{"type":"{event}","object":{t}}}"#)
    });
    kill_process(id, Signal::STOP)?;
    server.send_line(Resource::Services, &events.join("\n"));
    thread::sleep(A_WHILE);
    kill_process(id, Signal::CONT)?;
    wait_sample(&agent, seen, |changes| changes >= before + 2.0)?;
    settle(&agent)?;
    assert_eq!(programmed(&agent)?, ["s"]);
    assert_eq!(operations()?, made);
    Ok(())
}

#[test]
fn p215_p216_what_changes_nothing_causes_no_sync() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let (before, services, slices) =
        (syncs(&agent, "")?, changes_seen(&agent, "service")?, changes_seen(&agent, "endpoint")?);
    let mut annotated = with_port(80);
    annotated["metadata"]["annotations"] = json!({"note": "nothing that a proxy reads"});
    server.apply(annotated)?;
    assert!(server.touch(Resource::EndpointSlices, "a", "s-ipv4")?);
    until("both", || {
        Ok((changes_seen(&agent, "service")? > services && changes_seen(&agent, "endpoint")? > slices)
            .then_some(()))
    })?;
    settle(&agent)?;
    assert_eq!(syncs(&agent, "")?, before);
    // In contrast, this change does.
    server.apply(with_port(81))?;
    wait_port(&stage, 81)?;
    assert_eq!(syncs(&agent, "")?, before + 1.0);
    Ok(())
}

fn changes_seen(agent: &Agent, kind: &str) -> Result<f64> {
    sample(agent, &format!("kubeproxy_sync_proxy_rules_{kind}_changes_total"))
}

#[test]
fn p054_a_slice_of_host_names_is_not_counted() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let seen = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
    let before = sample(&agent, seen)?;
    let mut names = slice("s", "FQDN", &[]);
    for host in ["db.example", "db2.example"] {
        names["endpoints"] = json!([{"addresses": [host], "conditions": {"ready": true}}]);
        server.apply(names.clone())?;
    }
    assert!(server.delete(&names)?);
    // A later event of the same watch.
    server.apply(slice("s", "IPv4", &["L1", "R1"]))?;
    wait_sample(&agent, seen, |total| total > before)?;
    assert_eq!(sample(&agent, seen)?, before + 1.0);
    let p = stage.lab.pod("P");
    until("L1", || Ok((p.connect(CIP).one()?.server.as_deref() == Some("L1")).then_some(())))
}

#[test]
fn p217_local_policies_without_local_endpoints() -> Result<()> {
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    let local = json!({"internalTrafficPolicy": "Local"});
    server.apply_all([
        service("s", "10.96.0.10", &local),
        slice("s", "IPv4", &["R1"]),
        service("t", "10.96.0.20", &local),
    ])?;
    start(&mut agent)?;
    assert_eq!(sample(&agent, &without_local("internal", "IPv4"))?, 1.0);
    for (policy, family) in [("internal", "IPv6"), ("external", "IPv4"), ("external", "IPv6")] {
        assert_eq!(samples(&agent, &without_local(policy, family))?.into_values().collect::<Vec<_>>(), [0.0]);
    }
    server.apply(slice("s", "IPv4", &["R1", "L1"]))?;
    wait_sample(&agent, &without_local("internal", "IPv4"), |count| count == 0.0).map(drop)
}

fn without_local(policy: &str, family: &str) -> String {
    let labels = format!("{{traffic_policy=\"{policy}\",ip_family=\"{family}\"}}");
    format!("kubeproxy_sync_proxy_rules_no_local_endpoints_total{labels}")
}

#[test]
fn p218_p219_how_long_a_change_took() -> Result<()> {
    let stage = Stage::new()?;
    let (server, agent) = with_s(&stage)?;
    let name =
        |part: &str| format!("kubeproxy_network_programming_duration_seconds_{part}{{ip_family=\"IPv4\"}}");
    // Endpoints that were there at the start add no sample.
    assert_eq!(sample(&agent, &name("count"))?, 0.0);
    let mut changed = slice("s", "IPv4", &["L1", "R1"]);
    let since = Timestamp::try_from(SystemTime::now() - Duration::from_secs(2))?;
    changed["metadata"]["annotations"] =
        json!({"endpoints.kubernetes.io/last-change-trigger-time": since.to_string()});
    server.apply(changed.clone())?;
    wait_sample(&agent, &name("count"), |count| count == 1.0)?;
    let took = sample(&agent, &name("sum"))?;
    ensure!((2.0..10.0).contains(&took), "{took}");

    assert!(server.delete(&changed)?);
    until("no endpoints", || Ok((!stage.lab.pod("P").connect(CIP).one()?.ok).then_some(())))?;
    assert_eq!(sample(&agent, &name("count"))?, 1.0);
    Ok(())
}

#[test]
fn p220_one_of_many_services() -> Result<()> {
    const MANY: u16 = 500;
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    for number in 0..MANY {
        let [high, low] = number.to_be_bytes();
        let name = format!("s{number}");
        server.apply_all([
            service(&name, &format!("10.96.{}.{low}", 10 + high), &json!({})),
            slice(&name, "IPv4", &["L1", "R1"]),
        ])?;
    }
    start(&mut agent)?;
    settle(&agent)?;
    let operations =
        || -> Result<f64> { Ok(samples(&agent, "vipr_map_operations_total")?.into_values().sum()) };
    let (full, partial, before) = (syncs(&agent, "full_")?, syncs(&agent, "partial_")?, operations()?);
    ensure!(before > f64::from(MANY), "{before}");
    server.apply(slice("s77", "IPv4", &["L1"]))?;
    until("the change", || Ok((syncs(&agent, "partial_")? == partial + 1.0).then_some(())))?;
    let made = operations()? - before;
    ensure!((1.0..10.0).contains(&made), "{made} operations");
    settle(&agent)?;
    assert_eq!((syncs(&agent, "full_")?, syncs(&agent, "partial_")?), (full, partial + 1.0));
    Ok(())
}

#[test]
fn p221_leftovers_of_another_run_go() -> Result<()> {
    let stage = Stage::new()?;
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    let kept = [with_port(80), slice("s", "IPv4", &["L1"])];
    let gone = [service("gone", "10.96.0.20", &json!({})), slice("gone", "IPv4", &["L1"])];
    stage.write(&[&kept[..], &gone].concat())?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let p = stage.lab.pod("P");
    assert_eq!(programmed(&agent)?, ["gone", "s"]);
    assert!(p.connect("10.96.0.20:80").one()?.ok);

    let mut flow = p.connect(CIP).pace(Duration::from_millis(1)).start()?;
    flow.wait_for(10)?;
    agent.terminate()?;
    stage.write(&kept)?;
    flow.wait_for(10)?;
    start(&mut agent)?;
    assert_eq!(programmed(&agent)?, ["s"]);
    assert!(!p.connect("10.96.0.20:80").timeout(A_WHILE).one()?.ok);
    assert_eq!(syncs(&agent, "full_")?, 1.0);
    flow.wait_for(10)?;
    let summary = Summary::of(&flow.stop()?);
    assert!(summary.by_error.is_empty(), "{summary:?}");
    Ok(())
}
