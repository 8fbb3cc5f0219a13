//! `--keep`: everything keeps running, and the audience may try commands.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_common::abi::ABI_VERSION;
use proxy_tests::lab::{Place, binary};
use proxy_tests::scenarios::{NODE, OUTSIDE, World};

use crate::interrupted;
use crate::stage::Stage;

/// Prints commands to try, and waits for Ctrl-C.
pub(crate) fn running(world: &World, stage: &Stage) -> Result<()> {
    let inside = world.dir().join("in");
    write_program(&inside, &enter(world))?;
    let agent = world.dir().join("agent");
    write_program(&agent, &tool(world, &inside)?)?;
    let (inside, agent) = (inside.display(), agent.display());

    stage.line("");
    stage.title("Everything goes on until Ctrl-C");
    stage.say(
        "Commands for another terminal, as root. A process is served if it is in the node's cgroup: the program `in` puts it \
         there, and into the network namespace of the pod or node that you name.",
    );
    stage.line(&format!("\n  {inside}                      lists the pods, nodes and the machine outside"));
    stage.line(&format!("  {inside} client sh            a shell in the pod client; exit ends it"));
    for target in ["10.111.249.153:80", "10.96.66.66:80", "192.168.1.11:30123", "10.96.17.17:80"] {
        stage.line(&format!("  {inside} client {}", request(target)?));
    }
    stage.line(&format!("  {inside} node-b {}", request("10.96.0.1:443")?));
    for target in ["192.168.1.12:30123", "203.0.113.80:80"] {
        stage.line(&format!("  {inside} {OUTSIDE} {}", request(target)?));
    }
    stage.line(&format!(
        "  {inside} client {} connect 10.96.0.10:53 --proto udp --count 4",
        binary::lab_pod()?.display()
    ));
    stage.line("\n  # what the agent of node-a has programmed");
    for subcommand in ["services", "backends", "status"] {
        stage.line(&format!("  {agent} {subcommand}"));
    }
    let node = world.lab().node(NODE);
    stage.line(&format!("  bpftool map dump pinned {}/v{ABI_VERSION}/FRONTENDS", node.pin_dir().display()));
    stage.line("\n  # change a file, save it, and ask again: it is followed live");
    stage.line(&format!("  ${{EDITOR:-vi}} {}/s13-readiness.yaml", world.manifests().dir().display()));
    stage.line("\nCtrl-C ends the demo and removes everything.");
    while !interrupted() {
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Returns a program that runs its arguments in a place of the lab.
fn enter(world: &World) -> String {
    let mut places: Vec<Place> = world.lab().all_pods().iter().map(|pod| Place::clone(pod)).collect();
    places.extend(world.lab().nodes().iter().map(|node| node.host().clone()));
    places.push(world.outside());
    let names: Vec<&str> = places.iter().map(Place::name).collect();
    let mut script = String::from(
        "#!/bin/sh\n# PLACE COMMAND...: runs a command in a pod, on a node or outside of the demo.\ncase \"$1\" in\n",
    );
    for place in &places {
        // Writing to a String does not fail.
        let _ = writeln!(
            script,
            "{}) net={} cgroup={} ;;",
            place.name(),
            place.net().path(),
            place.cgroup().display()
        );
    }
    script
        + &format!(
            "*) echo \"usage: $0 PLACE COMMAND...\" >&2; echo 'places: {}' >&2; exit 2 ;;\nesac\n\
         [ $# -gt 1 ] || {{ echo \"usage: $0 PLACE COMMAND...\" >&2; exit 2; }}\nshift\n\
         echo $$ > \"$cgroup/cgroup.procs\" || exit\nexec nsenter --net=\"$net\" \"$@\"\n",
            names.join(" ")
        )
}

/// Returns a program that asks about the dataplane of [`NODE`].
fn tool(world: &World, inside: &Path) -> Result<String> {
    let node = world.lab().node(NODE);
    Ok(format!(
        "#!/bin/sh\n# SUBCOMMAND...: proxy-agent on {NODE}.\nexec {} {NODE} {} \"$@\" --pin-dir {} --run-dir {}\n",
        inside.display(),
        binary::proxy_agent()?.display(),
        node.pin_dir().display(),
        node.run_dir().display()
    ))
}

/// Returns the command of a request, by curl if it is installed, otherwise by the demo's own client.
fn request(target: &str) -> Result<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join("curl").is_file()) {
        return Ok(format!("curl -s --noproxy '*' http://{target}/"));
    }
    Ok(format!("{} connect {target} --proto http", binary::lab_pod()?.display()))
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .with_context(|| path.display().to_string())
}
