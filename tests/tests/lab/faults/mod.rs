//! Faults on a node, by their source. Clients go on connecting while the agent is killed, maps are replaced, files
//! are broken and the API server is away, and none of their connections fails.

mod api;
mod drift;
mod growth;
mod hosts;
mod limits;
mod manifests;
mod pins;
mod restarts;
mod storms;

use anyhow::{Result, ensure};
use proxy_tests::lab::Agent;
use proxy_tests::scenarios::World;
use serde_json::Value;

/// The Service that clients use during a fault.
const KUBIA: &str = "s01-clusterip.yaml";
const KUBIA_VIP: &str = "10.111.249.153:80";

/// Returns the number of each Service and backend, which must not change while no object changes.
fn numbers(world: &World, node: &str) -> Result<(Value, Value)> {
    Ok((world.tool(node, "services")?, world.tool(node, "backends")?))
}

/// Waits for the end of an agent that cannot run, and returns its log.
fn end_of(agent: Agent) -> Result<String> {
    // Another agent on that node has the default address.
    let mut agent = agent.flag("healthz-bind-address", "127.0.0.1:20256");
    agent.start()?;
    let ended = agent.wait_ready(std::time::Duration::from_secs(30));
    let log = agent.quiet().log();
    let Err(error) = ended else { anyhow::bail!("the agent became ready; its log:\n{log}") };
    ensure!(error.to_string().contains("the agent ended"), "it did not end: {error:#}");
    Ok(log)
}

/// Checks that a log ends with an error that has all of these words.
fn says(log: &str, words: &[&str]) -> Result<()> {
    let error: Vec<&str> = log.lines().skip_while(|line| !line.starts_with("error: ")).collect();
    let error = error.join("\n");
    let missing: Vec<&&str> = words.iter().filter(|word| !error.contains(**word)).collect();
    ensure!(!error.is_empty() && missing.is_empty(), "{missing:?} not in {error:?}; all of it:\n{log}");
    Ok(())
}
