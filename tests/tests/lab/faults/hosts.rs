//! A host that lacks something: the agent names what it lacks, and the remedy.

use std::path::Path;

use anyhow::Result;
use proxy_tests::lab::binary;
use proxy_tests::scenarios::{NODE, World};

use super::{KUBIA, end_of, says};

#[test]
fn a_cgroup_path_that_is_none() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    for path in ["/tmp", "/nowhere"] {
        let agent = world.new_agent(NODE)?.manifests(world.manifests().dir()).flag("cgroup-path", path);
        says(&end_of(agent)?, &["--cgroup-path", path, "cgroup v2", "/sys/fs/cgroup"])?;
    }
    Ok(())
}

#[test]
fn a_cgroup_that_the_agent_is_not_in() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    let elsewhere = world.client().cgroup().display().to_string();
    let agent = world.new_agent(NODE)?.manifests(world.manifests().dir()).flag("cgroup-path", &elsewhere);
    says(&end_of(agent)?, &["self-test", "not translated", "--cgroup-path", "/sys/fs/cgroup"])
}

#[test]
fn a_pin_directory_that_is_not_on_a_bpf_file_system() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    let dir = world.dir().join("pins");
    let agent = world.new_agent(NODE)?.manifests(world.manifests().dir()).flag("pin-dir", dir.display());
    says(&end_of(agent)?, &["--pin-dir", &dir.display().to_string(), "BPF file system", "/sys/fs/bpf"])?;
    assert!(!dir.exists(), "nothing is left behind");
    Ok(())
}

/// Runs the agent through a program that takes rights away from it, and returns its log.
fn without_rights(world: &World, wrapper: &[&str]) -> Result<String> {
    let mut command = world.host().command("timeout");
    command.args(["30", "setpriv"]).args(wrapper).arg(binary::proxy_agent()?).arg("run");
    let node = world.lab().node(NODE);
    for (flag, value) in [
        ("--manifests", world.manifests().dir()),
        ("--pin-dir", node.pin_dir()),
        ("--run-dir", node.run_dir()),
        ("--cgroup-path", node.cgroup()),
        ("--hostname-override", Path::new(NODE)),
    ] {
        command.arg(flag).arg(value);
    }
    let output = command.output()?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.code() == Some(1), "{}: {log}", output.status);
    Ok(log)
}

#[test]
fn missing_capabilities() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    let root = without_rights(&world, &["--bounding-set=-all", "--inh-caps=-all"])?;
    says(&root, &["run as root", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"])?;
    // An ordinary user is refused everything, the pin directory first.
    let mut executable = world.host().command("setpriv");
    executable
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(binary::proxy_agent()?)
        .arg("--help");
    if executable.output()?.status.success() {
        let nobody = without_rights(&world, &["--reuid=65534", "--regid=65534", "--clear-groups"])?;
        says(&nobody, &["run as root"])?;
    }
    Ok(())
}

#[test]
fn a_manifest_directory_that_is_missing() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    let dir = world.dir().join("nowhere");
    says(
        &end_of(world.new_agent(NODE)?.manifests(&dir))?,
        &["manifest directory", &dir.display().to_string(), "No such file"],
    )?;
    let file = world.dir().join("manifests/00-cluster.yaml");
    says(&end_of(world.new_agent(NODE)?.manifests(&file))?, &["manifest directory", "Not a directory"])
}

#[test]
fn a_kubeconfig_that_cannot_be_used() -> Result<()> {
    let world = World::new(&[KUBIA])?;
    let file = world.dir().join("kubeconfig");
    says(&end_of(world.new_agent(NODE)?.kubeconfig(&file))?, &["kubeconfig", &file.display().to_string()])?;
    std::fs::write(&file, "clusters: 7\n")?;
    says(&end_of(world.new_agent(NODE)?.kubeconfig(&file))?, &["kubeconfig", &file.display().to_string()])?;
    // Neither a cluster nor a directory is given, outside a pod.
    says(&end_of(world.new_agent(NODE)?)?, &["--kubeconfig"])
}
