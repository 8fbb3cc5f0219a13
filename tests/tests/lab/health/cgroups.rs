//! Readiness of agents in different cgroup namespaces: a ready agent serves other cgroups than its own.

use anyhow::ensure;
use proxy_tests::lab::binary;

use super::*;

const VIP: &str = "10.96.0.10:80";

impl Stage {
    /// Starts the agent in a cgroup namespace of its own, as container runtimes make one, with `cgroup` as
    /// `--cgroup-path`. The namespace already has its own mount at `DIR/own`, whose root is the agent's cgroup.
    fn start_in_cgroup_namespace(&self, cgroup: &str) -> Result<proxy_tests::lab::Proc> {
        let own = self.dir.path().join("own");
        fs::create_dir_all(&own)?;
        let script = "mount -t cgroup2 none \"$1\" && shift && exec \"$@\"";
        let mut command = self.host().command("unshare");
        command.args(["--cgroup", "--mount", "sh", "-c", script, "sh"]).arg(&own);
        command.arg(binary::proxy_agent()?).args(["run", "--hostname-override=n1", "--cgroup-path", cgroup]);
        command.args(["--healthz-bind-address", "127.0.0.1:10256"]);
        for (flag, dir) in [("--pin-dir", self.node().pin_dir()), ("--run-dir", self.node().run_dir())] {
            command.arg(flag).arg(dir);
        }
        command.arg("--manifests").arg(self.dir.path().join("manifests"));
        let log = fs::File::create(self.dir.path().join("log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        command.spawn()
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.path().join("log"))?)
    }

    fn is_ready(&self) -> bool {
        let answer = self.host().http_get("127.0.0.1:10256".parse().expect("an address"), "/readyz");
        answer.is_ok_and(|(status, _)| status == 200)
    }

    fn pod_is_served(&self) -> Result<bool> {
        Ok(self.lab.pod("L2").connect(VIP).one()?.server.as_deref() == Some("L1"))
    }
}

#[test]
fn an_agent_that_would_serve_its_own_container_alone_says_so_and_ends() -> Result<()> {
    let stage = Stage::new()?;
    stage.lab.pod("L1").serve().tcp(8080).start()?;
    stage.write(&[service("open", "10.96.0.10", &json!({})), slice("open", "IPv4", &["L1"])])?;

    // An agent in its own cgroup namespace that sees the host's cgroups.
    let served = stage.node().cgroup().display().to_string();
    let agent = stage.start_in_cgroup_namespace(&served)?;
    until("ready", || Ok(stage.is_ready().then_some(()))).with_context(|| stage.log().unwrap_or_default())?;
    ensure!(stage.pod_is_served()?, "a pod is not served");
    let mut status = stage.host().command(binary::proxy_agent()?);
    status.arg("status").arg("--pin-dir").arg(stage.node().pin_dir());
    status.arg("--run-dir").arg(stage.node().run_dir());
    let status = status.text()?;
    let line = status.lines().find(|line| line.starts_with("cgroup:")).context("cgroup")?;
    ensure!(line.contains(&format!("{served} (id ")) && line.contains("not the root"), "{line}");
    agent.terminate(Duration::from_secs(10))?;

    // The second agent has no mount of the host's cgroups. It never becomes ready, and the programs of the first
    // agent still serve the pod.
    let own = stage.dir.path().join("own").display().to_string();
    let mut agent = stage.start_in_cgroup_namespace(&own)?;
    let status = until("the end", || {
        ensure!(!stage.is_ready(), "it is ready: {}", stage.log()?);
        agent.ended()
    })?;
    let log = stage.log()?;
    ensure!(status.code() == Some(1), "{status}: {log}");
    ensure!(log.contains(&format!("{own} is the cgroup of this process itself")), "{log}");
    ensure!(log.contains("--cgroup-path"), "{log}");
    ensure!(stage.pod_is_served()?, "a pod is not served any more");
    Ok(())
}
