//! `healthCheckNodePort`, as load balancers query it.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use proxy_tests::lab::{HttpAnswer, Place, Summary};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::*;

/// The primary address of n1, with S-H's port.
const PORT: &str = "192.0.2.10:32000";
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// Returns S-H: a load-balanced Service with eTP Local and healthCheckNodePort 32000, and these fields besides.
fn s_h(more: &Value) -> Value {
    let mut spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "ports": [{"name": "web", "port": 80, "protocol": "TCP", "nodePort": 31080}],
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let mut object = service("s", "10.96.0.10", &spec);
    object["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.18.5.5"}]}});
    object
}

fn ask(place: &Place, address: &str) -> Result<HttpAnswer> {
    place.http(address.parse::<SocketAddr>()?, "/", &[])
}

/// Waits for an answer with this status.
fn wait(place: &Place, address: &str, status: u16) -> Result<HttpAnswer> {
    until(&format!("{status} from {address}"), || {
        Ok(ask(place, address).ok().filter(|answer| answer.status == status))
    })
}

fn is_refused(place: &Place, address: &str) -> bool {
    ask(place, address).is_err_and(|error| {
        let cause = error.root_cause().downcast_ref::<std::io::Error>();
        cause.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    })
}

fn wait_refused(place: &Place, address: &str) -> Result<()> {
    until(&format!("a refusal of {address}"), || Ok(is_refused(place, address).then_some(())))
}

/// Checks that the answer counts `endpoints`, in body and header.
fn tells(answer: &HttpAnswer, endpoints: usize, healthy: bool) -> Result<()> {
    let body: Value = serde_json::from_str(&answer.body)?;
    let want = json!({
        "service": {"namespace": "a", "name": "s"}, "localEndpoints": endpoints, "serviceProxyHealthy": healthy,
    });
    ensure!(body == want, "{answer:?}");
    ensure!(answer.header(WEIGHT) == Some(&*endpoints.to_string()), "{answer:?}");
    ensure!(answer.header("content-type") == Some("application/json"), "{answer:?}");
    ensure!(answer.header("x-content-type-options") == Some("nosniff"), "{answer:?}");
    Ok(())
}

#[test]
fn p190_p191_who_has_endpoints_says_so() -> Result<()> {
    let stage = Stage::new()?;
    let both = json!({
        "clusterIPs": ["10.96.0.10", "fd00:96::10"], "ipFamilies": ["IPv4", "IPv6"],
    });
    stage.write(&[s_h(&both), slice("s", "IPv4", &["L1", "L2/nr", "R1"])])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    tells(&wait(&x, PORT, 200)?, 1, true)?;
    // The answer is the same from everywhere; each family counts for itself.
    for place in [stage.host(), &*stage.lab.pod("P"), stage.lab.node("n2").host()] {
        tells(&ask(place, PORT)?, 1, true)?;
    }
    tells(&wait(&x, "[2001:db8:1::10]:32000", 503)?, 0, true)?;
    // Other addresses of the node do not listen.
    for other in ["198.51.100.10:32000", "[2001:db8:2::10]:32000"] {
        ensure!(is_refused(&x, other), "{other}");
    }

    stage.write(&[s_h(&both), slice("s", "IPv4", &["R1"]), slice("s", "IPv6", &["V1"])])?;
    tells(&wait(&x, PORT, 503)?, 0, true)?;
    tells(&wait(&x, "[2001:db8:1::10]:32000", 200)?, 1, true)
}

#[test]
fn p190_every_address_that_serves_node_ports() -> Result<()> {
    let stage = Stage::new()?;
    stage.write(&[s_h(&json!({})), slice("s", "IPv4", &["L1"])])?;
    let mut agent = stage.with_manifests()?.flag("nodeport-addresses", "192.0.2.0/24,198.51.100.0/24");
    start(&mut agent)?;
    for address in [PORT, "198.51.100.10:32000"] {
        tells(&wait(&stage.lab.client("X"), address, 200)?, 1, true)?;
    }
    // A new address is listened on, a removed address is not.
    stage.host().net().ip("address add 192.0.2.99/24 dev eth0")?;
    tells(&wait(stage.host(), "192.0.2.99:32000", 200)?, 1, true)?;
    agent.terminate()?;
    let mut agent = agent.flag("nodeport-addresses", "0.0.0.0/0");
    start(&mut agent)?;
    for address in [PORT, "127.0.0.1:32000"] {
        tells(&wait(stage.host(), address, 200)?, 1, true)?;
    }
    Ok(())
}

#[test]
fn p192_endpoints_that_terminate_get_traffic_but_no_new_load_balancers() -> Result<()> {
    let stage = Stage::new()?;
    for pod in ["L1", "L2"] {
        stage.lab.pod(pod).serve().tcp(8080).start()?;
    }
    stage.write(&[s_h(&json!({})), slice("s", "IPv4", &["L1", "L2"])])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    tells(&wait(&x, PORT, 200)?, 2, true)?;
    stage.write(&[s_h(&json!({})), slice("s", "IPv4", &["L1/st", "L2/st"])])?;
    tells(&wait(&x, PORT, 503)?, 0, true)?;
    let attempts = x.connect("198.18.5.5:80").times(20).run()?;
    assert_eq!(Summary::of(&attempts).servers(), ["L1", "L2"]);
    assert!(attempts.iter().all(|a| a.peer.is_some_and(|peer| peer.ip().to_string() == "203.0.113.7")));
    Ok(())
}

#[test]
fn p193_an_address_counts_once() -> Result<()> {
    let stage = Stage::new()?;
    let ports = json!({"ports": [{"name": "web", "port": 80}, {"name": "adm", "port": 443}]});
    let mut slice = slice("s", "IPv4", &["L1"]);
    slice["ports"] = json!([{"name": "web", "port": 8080}, {"name": "adm", "port": 8443}]);
    stage.write(&[s_h(&ports), slice])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    tells(&wait(&stage.lab.client("X"), PORT, 200)?, 1, true)
}

/// The answer is that of a node without endpoints, so that no load balancer sends traffic to a Service that is not
/// served.
#[test]
fn a_service_beyond_its_budget_has_no_endpoints() -> Result<()> {
    let stage = Stage::new()?;
    let lawful = [s_h(&json!({})), slice("s", "IPv4", &["L1"])];
    stage.write(&lawful)?;
    let mut agent = stage.with_manifests()?.flag("max-service-endpoints", 1);
    start(&mut agent)?;
    let x = stage.lab.client("X");
    tells(&wait(&x, PORT, 200)?, 1, true)?;
    stage.write(&[s_h(&json!({})), slice("s", "IPv4", &["L1", "L2"])])?;
    tells(&wait(&x, PORT, 503)?, 0, true)?;
    ensure!(problems(&agent, "Service a/s")?.concat().contains("--max-service-endpoints"));
    // The answer is the same of an agent that starts with such a Service.
    agent.kill9()?;
    start(&mut agent)?;
    tells(&wait(&x, PORT, 503)?, 0, true)?;
    stage.write(&lawful)?;
    tells(&wait(&x, PORT, 200)?, 1, true)
}

#[test]
fn p194_p199_an_agent_that_is_stuck_says_no() -> Result<()> {
    let stage = Stage::new()?;
    let objects = [s_h(&json!({})), slice("s", "IPv4", &["L1"])];
    stage.write(&objects)?;
    // A probe fails after twice the period.
    let mut agent =
        stage.with_manifests()?.flag("iptables-sync-period", "1s").flag("iptables-min-sync-period", "1s");
    start(&mut agent)?;
    let x = stage.lab.client("X");
    tells(&wait(&x, PORT, 200)?, 1, true)?;
    stage.freeze_frontends()?;
    let other = service("t", "10.96.0.20", &json!({}));
    stage.write(&[&objects[..], &[other]].concat())?;
    until("a failure", || Ok(agent.log().contains("programming failed; trying again").then_some(())))?;
    assert_eq!(ask(&x, PORT)?.status, 200, "not yet for long");
    tells(&wait(&x, PORT, 503)?, 1, false)?;
    for path in ["/livez", "/healthz"] {
        let (status, body) = agent.get(path)?;
        let body: Value = serde_json::from_str(&body)?;
        assert_eq!((status, &body["healthy"]), (503, &json!(false)), "{path}");
    }
    assert!(sample(&agent, "vipr_sync_failures_total")? >= 2.0);
    Ok(())
}

#[test]
fn p195_a_policy_that_changes_and_a_service_that_goes() -> Result<()> {
    let stage = Stage::new()?;
    let slice = slice("s", "IPv4", &["L1"]);
    stage.write(&[s_h(&json!({})), slice.clone()])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    for after in [Some(json!({"externalTrafficPolicy": "Cluster"})), None] {
        wait(&x, PORT, 200)?;
        let objects: Vec<Value> = after.iter().map(s_h).chain([slice.clone()]).collect();
        stage.write(&objects)?;
        wait_refused(&x, PORT)?;
        stage.write(&[s_h(&json!({})), slice.clone()])?;
    }
    wait(&x, PORT, 200)?;
    // A process of the host may have the port, like any other port that is not served.
    stage.write(&[])?;
    wait_refused(&x, PORT)?;
    stage.host().serve().http(32000).start()?;
    wait(&x, PORT, 200).map(drop)
}

#[test]
fn p196_a_service_without_a_load_balancer_has_none() -> Result<()> {
    let stage = Stage::new()?;
    let mut other =
        s_h(&json!({"healthCheckNodePort": 32001, "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"]}));
    other["metadata"]["name"] = "t".into();
    other["spec"]["ports"][0]["nodePort"] = 31081.into();
    other["status"] = Value::Null;
    stage.write(&[s_h(&json!({"type": "NodePort"})), other, slice("s", "IPv4", &["L1"])])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    // If this port were to be opened, it would be open together with the others.
    wait(&x, "192.0.2.10:32001", 503)?;
    ensure!(is_refused(&x, PORT));
    Ok(())
}

#[test]
fn p197_a_port_that_moves() -> Result<()> {
    let stage = Stage::new()?;
    let (server, mut agent) = stage.with_api()?;
    server.apply_all([s_h(&json!({})), slice("s", "IPv4", &["L1"])])?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    tells(&wait(&x, PORT, 200)?, 1, true)?;
    // The port of a Service cannot be changed, so another Service takes its place.
    assert!(server.delete(&s_h(&json!({})))?);
    server.apply(s_h(&json!({"healthCheckNodePort": 32001})))?;
    tells(&wait(&x, "192.0.2.10:32001", 200)?, 1, true)?;
    wait_refused(&x, PORT)?;
    // Or the object is overwritten, as by a file.
    server.apply(s_h(&json!({})))?;
    tells(&wait(&x, PORT, 200)?, 1, true)?;
    wait_refused(&x, "192.0.2.10:32001")
}

#[test]
fn a_port_that_is_taken_costs_only_itself() -> Result<()> {
    let stage = Stage::new()?;
    let squatter = stage.lab.node("n1").host();
    squatter.serve().at("http", PORT).start()?;
    let mut other =
        s_h(&json!({"healthCheckNodePort": 32001, "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"]}));
    other["metadata"]["name"] = "t".into();
    other["spec"]["ports"][0]["nodePort"] = 31081.into();
    other["status"] = Value::Null;
    let (server, mut agent) = stage.with_api()?;
    server.apply_all([s_h(&json!({})), other, slice("s", "IPv4", &["L1"])])?;
    start(&mut agent)?;
    let x = stage.lab.client("X");
    wait(&x, "192.0.2.10:32001", 503)?;
    let told =
        until("the problem", || Ok(Some(problems(&agent, "Service a/s")?).filter(|told| !told.is_empty())))?;
    ensure!(told.len() == 1 && told[0].contains(PORT) && told[0].contains("healthCheckNodePort"), "{told:?}");
    ensure!(problems(&agent, "Service a/t")?.is_empty());
    let event = until("the Event", || {
        let recorded = server.recorded_events();
        Ok(recorded.into_iter().find(|event| event["reason"] == "FailedToStartServiceHealthcheck"))
    })?;
    assert_eq!((&event["type"], &event["note"]), (&json!("Warning"), &json!(told[0])));
    let uid =
        server.get(proxy_tests::apiserver::Resource::Services, "a", "s").unwrap()["metadata"]["uid"].clone();
    assert_eq!((&event["regarding"]["name"], &event["regarding"]["uid"]), (&json!("s"), &uid));

    // The rest of the Service is not affected.
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    ensure!(x.connect("198.18.5.5:80").one()?.ok);
    drop(agent);
    Ok(())
}
