//! Replaces the endpoint of a Service while clients use it.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use proxy_tests::lab::{Attempt, Flow, Held, Place, Proto, Summary};
use serde_json::json;

use super::checks::held;
use super::objects::{Backend, HERE, Service, THERE, cluster_ip, node_port, service};
use super::row::{Outcome, Row, right};
use super::world::{ANSWER, MOVING, World};

pub(super) const ROWS: &[Row] = &[Row { id: "k060_udp_endpoint_replaced", check: replaced }];

/// Checks clients that use sockets for 20 datagrams each, and others that keep one socket each.
fn replaced(world: &World) -> Result<Outcome> {
    move_to(world, HERE)?;
    let [pod, unseen, outside] = [world.pod("P"), world.pod("U"), world.lab().client("X")];
    let vip = cluster_ip(MOVING.number, false, 80);
    let mut loads = [load(&pod, &vip)?, load(&unseen, &vip)?, load(&outside, &vip)?];
    let mut connected = hold(&pod, &vip)?;
    let mut in_packets = [hold(&unseen, &vip)?, hold(&outside, &node_port(MOVING.number, false, 80))?];
    loads.iter_mut().try_for_each(|load| load.wait_for(20))?;

    move_to(world, THERE)?;
    for held in &mut in_packets {
        answered_by(&held.say("after")?, THERE)?;
    }
    // The pod that the socket is connected to has left: the socket is moved to the other one, and its owner notices
    // nothing.
    let led = connected.say_until(ANSWER, |attempt| attempt.server.as_deref() != Some(HERE.name))?;
    answered_by(&led, THERE)?;
    ensure!(led.peername == connected.opened().peername, "{led:?} after {:?}", connected.opened());
    let mut datagrams = 0;
    for mut load in loads {
        // The first datagram may have been sent before.
        load.wait_for(2)?;
        let moved = load.so_far()?.len();
        load.wait_for(20)?;
        let all = load.stop()?;
        let lost: Vec<&Attempt> = all.iter().filter(|attempt| !attempt.ok).collect();
        ensure!(
            lost.is_empty(),
            "{} of {} datagrams were not answered: {:?}",
            lost.len(),
            all.len(),
            lost[0]
        );
        ensure!(all[0].server.as_deref() == Some(HERE.name), "began with {:?}", all[0]);
        let after = Summary::of(&all[moved..]);
        ensure!(after.servers() == [THERE.name], "goes on to {:?}", after.by_server);
        datagrams += all.len();
    }
    right(format!("{datagrams} datagrams answered, no flow stays behind; a connected socket follows"))
}

fn load(place: &Place, vip: &str) -> Result<Flow> {
    place.connect(vip).udp_unconnected().per_socket(20).timeout(ANSWER).pace(Duration::from_millis(2)).start()
}

fn hold(place: &Place, target: &str) -> Result<Held> {
    let mut held = held(place, Proto::Udp, target)?;
    answered_by(&held.say("before")?, HERE)?;
    Ok(held)
}

fn move_to(world: &World, backend: Backend) -> Result<()> {
    let backends: &[Backend] = if backend.name == HERE.name { &[HERE] } else { &[THERE] };
    world.write("moving", &service(Service { backends, ..MOVING }, json!({})))?;
    world.wait_backend(MOVING, backend)
}

fn answered_by(attempt: &Attempt, backend: Backend) -> Result<()> {
    if attempt.server.as_deref() == Some(backend.name) {
        return Ok(());
    }
    bail!("not answered by {}: {attempt:?}", backend.name)
}
