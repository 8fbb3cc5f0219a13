//! `/healthz` and `/livez` of the running agent.

use anyhow::Result;
use k8s_openapi::jiff::Timestamp;
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::*;

/// Waits until the status codes of `/healthz` and `/livez` are these, and returns the bodies.
fn wait(agent: &Agent, healthz: u16, livez: u16) -> Result<[Value; 2]> {
    until(&format!("{healthz} and {livez}"), || {
        let (first, second) = (agent.get("/healthz")?, agent.get("/livez")?);
        let bodies = [serde_json::from_str(&first.1)?, serde_json::from_str(&second.1)?];
        Ok(((first.0, second.0) == (healthz, livez)).then_some(bodies))
    })
}

/// Checks kube-proxy's headers and the times of the answer and of the last update, which every answer has.
fn has_its_form(stage: &Stage, path: &str, status: u16) -> Result<()> {
    let answer = stage.host().http("127.0.0.1:10256".parse()?, path, &[])?;
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert!(!answer.body.ends_with('\n'), "{answer:?}");
    let body: Value = serde_json::from_str(&answer.body)?;
    let times = ["lastUpdated", "currentTime"].map(|field| body[field].as_str().unwrap_or_default());
    let [updated, now] = times.map(str::parse::<Timestamp>);
    let (updated, now) = (updated?, now?);
    assert_eq!(updated == now, status == 200, "{answer:?}");
    assert!(updated <= now && Timestamp::now().duration_since(now).as_secs() < 60, "{answer:?}");
    Ok(())
}

#[test]
fn p198_p204_a_node_that_is_fine() -> Result<()> {
    let stage = Stage::new()?;
    stage.write(&[])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    let [healthz, livez] = wait(&agent, 200, 200)?;
    for body in [&healthz, &livez] {
        assert_eq!(body["healthy"], true, "{body}");
        assert_eq!(body["lastUpdated"], body["currentTime"], "{body}");
        for family in ["IPv4", "IPv6"] {
            assert_eq!(body["status"][family]["healthy"], true, "{body}");
        }
    }
    assert_eq!((&healthz["nodeEligible"], livez.get("nodeEligible")), (&json!(true), None));
    for path in ["/healthz", "/livez"] {
        has_its_form(&stage, path, 200)?;
    }
    assert!(sample(&agent, "kubeproxy_proxy_healthz_total{code=\"200\"}")? >= 2.0);
    Ok(())
}

#[test]
fn p200_p201_p202_p204_a_node_that_goes() -> Result<()> {
    let stage = Stage::new()?;
    stage.write(&[])?;
    let mut agent = stage.with_manifests()?;
    start(&mut agent)?;
    wait(&agent, 200, 200)?;

    let mut tainted = stage.node().object();
    tainted["spec"]["taints"] = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    stage.write_with_node(tainted.clone(), &[])?;
    let [healthz, livez] = wait(&agent, 503, 200)?;
    assert_eq!((&healthz["healthy"], &healthz["nodeEligible"]), (&json!(true), &json!(false)));
    assert_eq!(livez.get("nodeEligible"), None);
    has_its_form(&stage, "/healthz", 503)?;

    tainted["spec"]["unschedulable"] = true.into();
    tainted["spec"]["taints"] = json!([{"key": "other", "value": "x", "effect": "NoSchedule"}]);
    stage.write_with_node(tainted.clone(), &[])?;
    wait(&agent, 200, 200)?;

    tainted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    stage.write_with_node(tainted, &[])?;
    wait(&agent, 503, 200).map(drop)
}
