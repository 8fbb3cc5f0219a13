//! The parts of the tour in which packets come from outside.

use std::time::Duration;

use anyhow::Result;
use proxy_tests::lab::{Attempt, Place, Proto};
use proxy_tests::scenarios::{NODE, OUTSIDE, OUTSIDE_ADDRESS, World, evenly};

use crate::acts::{KUBIA, tell};
use crate::stage::Stage;

/// Time that the audience waits for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(700);

pub(crate) fn node_ports(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("nodePorts, from inside and from outside");
    stage.say(
        "kubia-nodeport has port 30123 on the address of every node, also where only one of its pods runs. Pods and nodes \
         are served at their sockets, as before; the packets of the machine outside are translated as they enter the node.",
    );
    let [pod, host] = world.clients();
    let far = world.lab().node("node-b").host().clone();
    for (name, place, target) in [
        ("pod client", pod, "192.168.1.11:30123"),
        ("node-a", host, "192.168.1.11:30123"),
        ("node-b", far, "192.168.1.12:30123"),
        (OUTSIDE, world.outside(), "192.168.1.11:30123"),
        (OUTSIDE, world.outside(), "192.168.1.12:30123"),
    ] {
        stage.command(name, &format!("curl http://{target}/        (150 times)"));
        let attempts = place.connect(target).http().times(150).run()?;
        if name == OUTSIDE {
            one_of_each(stage, &attempts);
        }
        let summary = stage.answered(target, &attempts);
        stage.expect(evenly(&summary, &KUBIA));
    }
    Ok(())
}

/// Describes the first connection to each pod.
fn one_of_each(stage: &Stage, attempts: &[Attempt]) {
    for pod in KUBIA {
        let first = attempts.iter().find(|attempt| attempt.server.as_deref() == Some(pod));
        first.into_iter().for_each(|attempt| tell(stage, attempt));
    }
}

pub(crate) fn load_balancer(world: &mut World, stage: &mut Stage) -> Result<()> {
    let target = "203.0.113.80:80";
    stage.act("A load balancer");
    stage.say(
        "A cloud has given kubia-loadbalancer the address 203.0.113.80 and passes what is for it to a node, first to node-a, \
         then to node-b. A pod on the same node sees the client itself; for a pod on the other node its own node stands in, \
         so that the answer comes back the same way.",
    );
    for node in [NODE, "node-b"] {
        world.lab().outside_via(node)?;
        stage.command(OUTSIDE, &format!("curl http://203.0.113.80/        (150 times, through {node})"));
        let attempts = world.outside().connect(target).http().times(150).run()?;
        one_of_each(stage, &attempts);
        let summary = stage.answered(target, &attempts);
        stage.expect(evenly(&summary, &KUBIA));
    }
    world.lab().outside_via(NODE)
}

pub(crate) fn local_policy(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("externalTrafficPolicy: Local");
    stage.say(
        "local-nodeport has pods on node-b alone, and its policy says that a node answers for its own pods only. They see \
         the client's own address; node-a is silent, so that a load balancer passes it by.",
    );
    let outside = world.outside();
    let target = "192.168.1.12:30124";
    stage.command(OUTSIDE, &format!("curl http://{target}/        (100 times)"));
    let attempts = outside.connect(target).http().times(100).run()?;
    one_of_each(stage, &attempts);
    let summary = stage.answered(target, &attempts);
    stage.expect(evenly(&summary, &["kubia-gzwli", "kubia-3inly"]));
    let own = |attempt: &Attempt| attempt.peer.is_some_and(|peer| peer.ip().to_string() == OUTSIDE_ADDRESS);
    stage.check(attempts.iter().all(own), &format!("every pod saw {OUTSIDE_ADDRESS}"));

    let target = "192.168.1.11:30124";
    stage.command(OUTSIDE, &format!("curl http://{target}/"));
    let attempt = outside.connect(target).http().timeout(SILENCE).one()?;
    stage.add(1);
    let error = attempt.error.unwrap_or_else(|| "answered".to_owned());
    stage.check(error == "ETIMEDOUT", &format!("node-a, without a pod: {error}"));
    Ok(())
}

pub(crate) fn unused_ports(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("What a Service does not have");
    stage.say(
        "Nobody answers to ping at a clusterIP, and kubia has port 80 only. Clients are told so at once.",
    );
    let [pod, host] = world.clients();
    let clients: [(&str, Place); 3] = [("pod client", pod), (NODE, host), (OUTSIDE, world.outside())];
    for (name, place) in clients {
        for (proto, target, command) in [
            (Proto::Ping, "10.111.249.153:0", "ping -c 1 10.111.249.153"),
            (Proto::Http, "10.111.249.153:81", "curl http://10.111.249.153:81/"),
        ] {
            stage.command(name, command);
            let attempt = place.connect(target).proto(proto).timeout(Duration::from_secs(5)).one()?;
            stage.add(1);
            let error = attempt.error.unwrap_or_else(|| "answered".to_owned());
            stage.check(
                error == "ECONNREFUSED" && attempt.elapsed_us < 500_000,
                &format!("{error} after {} µs", attempt.elapsed_us),
            );
        }
    }
    Ok(())
}
