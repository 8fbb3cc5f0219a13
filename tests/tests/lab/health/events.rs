//! Events, as `kubectl describe` shows them.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_tests::apiserver::{ApiServer, Resource, Verb};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::*;

/// Returns the Events with this reason.
fn with_reason(server: &ApiServer, reason: &str) -> Vec<Value> {
    server.recorded_events().into_iter().filter(|event| event["reason"] == reason).collect()
}

fn wait(server: &ApiServer, reason: &str, count: usize) -> Result<Vec<Value>> {
    until(&format!("{count} Events {reason}"), || {
        Ok(Some(with_reason(server, reason)).filter(|events| events.len() == count))
    })
}

#[test]
fn a_start_and_a_service_with_a_problem() -> Result<()> {
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    server.apply(service("s", "10.96.0.10", &json!({"externalIPs": ["nonsense"]})))?;
    start(&mut agent)?;
    let [started] = &wait(&server, "Starting", 1)?[..] else { unreachable!("one") };
    let regarding = json!({"kind": "Node", "name": "n1", "uid": "n1"});
    assert_eq!((&started["type"], &started["regarding"]), (&json!("Normal"), &regarding));
    assert_eq!(
        (&started["reportingController"], &started["reportingInstance"]),
        (&json!("vipr"), &json!("n1"))
    );

    let [event] = &wait(&server, "ServiceProblem", 1)?[..] else { unreachable!("one") };
    let object = server.get(Resource::Services, "a", "s").unwrap();
    let regarding = &event["regarding"];
    assert_eq!((&regarding["kind"], &regarding["uid"]), (&json!("Service"), &object["metadata"]["uid"]));
    assert_eq!((&event["type"], &event["metadata"]["namespace"]), (&json!("Warning"), &json!("a")));
    let [problem] = &problems(&agent, "Service a/s")?[..] else { unreachable!("one") };
    assert_eq!(event["note"], json!(problem));

    // The Event is not repeated at each sync, nor when the problem soon returns; another problem is another Event.
    for port in 81..91 {
        let ports = json!([{"name": "web", "port": port, "protocol": "TCP"}]);
        let fields = if port % 2 == 0 {
            json!({"ports": ports})
        } else {
            json!({"externalIPs": ["nonsense"], "ports": ports})
        };
        server.apply(service("s", "10.96.0.10", &fields))?;
        until("the change", || {
            Ok((problems(&agent, "Service a/s")?.len() == usize::from(port % 2 == 1)).then_some(()))
        })?;
    }
    server.apply(service("s", "10.96.0.10", &json!({"externalIPs": ["rubbish"]})))?;
    let both = wait(&server, "ServiceProblem", 2)?;
    assert!(
        both.iter().any(|event| event["note"].as_str().is_some_and(|note| note.contains("rubbish"))),
        "{both:?}"
    );
    assert_eq!(sample(&agent, "vipr_events_total{result=\"written\"}")?, 3.0);
    Ok(())
}

#[test]
fn a_service_that_does_not_fit() -> Result<()> {
    let stage = Stage::new()?;
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    let (server, mut agent) = stage.with_api()?;
    server.apply_all([service("t", "10.96.0.20", &json!({})), slice("t", "IPv4", &["L1"])])?;
    start(&mut agent)?;
    // The Service has more addresses than `FRONTENDS` has room for, and an obstacle is at the place where a larger
    // map would be pinned.
    fs::create_dir(stage.node().pin_dir().join(format!("v{ABI_VERSION}/FRONTENDS-larger")))?;
    let capacity = sample(&agent, "vipr_map_capacity{map=\"FRONTENDS\"}")? as u32;
    let addresses: Vec<String> = (0..capacity + 10)
        .map(|number| Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 1)) + number).to_string())
        .collect();
    server.apply(service("s", "10.96.0.10", &json!({"externalIPs": addresses})))?;
    // One Event covers all refused addresses.
    let [event] = &wait(&server, "ServiceProblem", 1)?[..] else { unreachable!("one") };
    assert_eq!(event["regarding"]["name"], "s", "{event}");
    let note = event["note"].as_str().unwrap_or_default();
    ensure!(note.contains("FRONTENDS is full") && note.contains("more: `proxy-agent status`"), "{note}");
    ensure!(problems(&agent, "Service a/s")?.len() > 10);
    // Other Services are served.
    ensure!(problems(&agent, "Service a/t")?.is_empty());
    ensure!(stage.lab.pod("P").connect("10.96.0.20:80").one()?.ok);
    Ok(())
}

#[test]
fn an_address_that_cannot_be_bound() -> Result<()> {
    let stage = Stage::new()?;
    for (flag, reason) in [
        ("healthz-bind-address", "FailedToStartProxierHealthcheck"),
        ("metrics-bind-address", "FailedToStartMetricsServer"),
    ] {
        let (server, agent) = stage.with_api()?;
        // The address is the API server's own.
        let mut agent = agent.flag(flag, "127.0.0.1:6443").flag("bind-address-hard-fail", "true");
        agent.start()?;
        assert_eq!(agent.wait_end(PATIENCE)?.code(), Some(1));
        let [event] = &with_reason(&server, reason)[..] else {
            unreachable!("{:?}", server.recorded_events())
        };
        assert_eq!((&event["type"], &event["regarding"]["kind"]), (&json!("Warning"), &json!("Node")));
        ensure!(event["note"].as_str().is_some_and(|note| note.contains("127.0.0.1:6443")), "{event}");
        let log = agent.quiet().log();
        ensure!(
            log.lines().any(|line| line.starts_with("error: ") && line.contains("127.0.0.1:6443")),
            "{log}"
        );
    }
    Ok(())
}

/// A namespace is full of Services with problems, and then another namespace has its first problem.
#[test]
fn a_namespace_does_not_silence_another() -> Result<()> {
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    let wrong = json!({"externalIPs": ["nonsense"]});
    start(&mut agent)?;
    for (round, n) in (0..4).flat_map(|round: u32| (0..250).map(move |n| (round, n))) {
        server.apply(service(&format!("s{round}-{n}"), &format!("10.96.{}.{n}", round + 1), &wrong))?;
    }
    wait_sample(&agent, "vipr_problems", |problems| problems == 1_000.0)?;
    let mut quiet = service("quiet", "10.96.9.1", &wrong);
    quiet["metadata"]["namespace"] = "b".into();
    server.apply(quiet)?;
    until("the Event of the other namespace", || {
        let events = with_reason(&server, "ServiceProblem");
        let [a, b] = ["a", "b"].map(|namespace| {
            events.iter().filter(|event| event["metadata"]["namespace"] == namespace).count()
        });
        ensure!(a <= 11, "{a}");
        Ok((b == 1).then_some(()))
    })?;
    assert_eq!(problems(&agent, "Service b/quiet")?.len(), 1);
    let rest = problems(&agent, "all of a")?;
    assert!(rest.len() == 1 && rest[0].contains("900 more objects"), "{rest:?}");
    let log = agent.quiet().log();
    let [a, b] = ["Service a/", "Service b/"]
        .map(|namespace| log.lines().filter(|line| line.contains(namespace)).count());
    assert!(a <= 60 && b == 1, "{a} lines and {b}");
    Ok(())
}

#[test]
fn nobody_waits_for_events() -> Result<()> {
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    // Creating Events is forbidden: that is logged once, and has no other effect.
    server.fail(Some(Verb::Create), Some(Resource::Events), 403, 1000);
    server.apply_all((0..100).map(|n| {
        service(&format!("s{n}"), &format!("10.96.1.{n}"), &json!({"externalIPs": ["nonsense"]}))
    }))?;
    start(&mut agent)?;
    wait_sample(&agent, "vipr_problems", |problems| problems == 100.0)?;
    wait_sample(&agent, "vipr_events_total{result=\"failed\"}", |failed| failed >= 10.0)?;
    wait_sample(&agent, "vipr_events_total{result=\"dropped\"}", |dropped| dropped >= 50.0)?;
    server.apply(service("last", "10.96.2.1", &json!({})))?;
    until("the last Service", || {
        let services = agent.tool("services", &[])?;
        let found = services.as_array().is_some_and(|all| all.iter().any(|port| port["name"] == "last"));
        Ok(found.then_some(()))
    })
}
