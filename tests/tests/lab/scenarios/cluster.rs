//! S14, S15: Services of every cluster, DNS and the API server.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::lab::{Held, Place, Proto};
use proxy_tests::scenarios::{Loops, NODE, World, at_most, endpoint, evenly, served, until};

const DNS: &str = "10.96.0.10:53";
const COREDNS: [&str; 2] = ["coredns-4n8cx", "coredns-t9v2k"];
#[test]
fn s14_dns_over_udp_and_tcp() -> Result<()> {
    let world = World::start(&["s14-dns.yaml"])?;
    for place in world.clients() {
        for proto in [Proto::Udp, Proto::UdpUnconnected, Proto::Tcp] {
            let attempts = place.connect(DNS).proto(proto).times(200).run()?;
            evenly(&served(DNS, &attempts)?, &COREDNS)?;
            let ports: BTreeSet<_> = attempts.iter().map(|a| a.endpoint.map(|e| e.port())).collect();
            assert_eq!(ports, BTreeSet::from([Some(53)]), "{proto:?}");
        }
        let metrics = "10.96.0.10:9153";
        evenly(&served(metrics, &place.connect(metrics).http().times(200).run()?)?, &COREDNS)?;
        // A resolver that keeps its unconnected socket keeps its server.
        let attempts = place.connect(DNS).udp_unconnected().times(50).per_socket(50).run()?;
        at_most(1, &served(DNS, &attempts)?)?;
    }
    Ok(())
}

/// Returns a resolver's socket that is connected to that pod.
fn resolver(place: &Place, pod: &str) -> Result<Held> {
    until(&format!("a connection to {pod}"), || {
        let mut held = place.hold(DNS).udp().open()?;
        let answer = held.say("who are you?")?;
        ensure!(answer.ok && answer.peername == Some(DNS.parse::<SocketAddr>()?), "{answer:?}");
        Ok((answer.server.as_deref() == Some(pod)).then_some(held))
    })
}

#[test]
fn s14_a_dns_pod_that_has_gone_is_not_asked_again() -> Result<()> {
    let file = "s14-dns.yaml";
    let world = World::start(&[file])?;
    let [gone, left] = COREDNS;
    let (mut orphans, mut others, mut loops) = (Vec::new(), Vec::new(), Loops::default());
    for place in world.clients() {
        orphans.push(resolver(&place, gone)?);
        others.push(resolver(&place, left)?);
        // Sockets that are never connected and never replaced; sooner or later, one of them is on each pod.
        for _ in 0..4 {
            loops.add(DNS, place.connect(DNS).udp_unconnected().per_socket(usize::MAX))?;
        }
    }
    loops.go_on()?;

    world.manifests().set_endpoints(file, vec![endpoint(left, "node-b", "172.16.2.53")])?;
    world.wait_ports(NODE, "kube-system/kube-dns", |ports| {
        ports.iter().all(|port| port.cluster.iter().all(|e| e.ip() == IpAddr::from([172, 16, 2, 53])))
    })?;
    for orphan in &mut orphans {
        // The old pod still runs and would answer. Its socket is moved to the other pod anyway.
        orphan.say_until(Duration::from_secs(30), |answer| answer.server.as_deref() == Some(left))?;
    }
    for summary in loops.next(20)? {
        assert_eq!(summary.servers(), [left]);
    }
    world.lab().remove_pod(gone)?;
    for summary in loops.next(20)? {
        assert_eq!(summary.servers(), [left]);
    }
    for other in orphans.iter_mut().chain(&mut others) {
        let answer = other.say("still there?")?;
        assert!(answer.ok, "a socket on a pod that stays is left alone: {answer:?}");
    }
    for place in world.clients() {
        evenly(&served(DNS, &place.connect(DNS).udp().times(20).run()?)?, &[left])?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn s15_an_endpoint_on_the_network_of_a_node() -> Result<()> {
    let mut world = World::start(&["s15-kubernetes.yaml"])?;
    world.start_agent("node-b")?;
    let vip = "10.96.0.1:443";
    let [pod, host] = world.clients();
    for place in [pod, host, world.lab().node("node-b").host().clone()] {
        let attempts = place.connect(vip).http().times(20).run()?;
        evenly(&served(vip, &attempts)?, &["node-b"])?;
        assert!(attempts.iter().all(|a| a.endpoint == Some(([192, 168, 1, 12], 6443).into())));
    }
    Ok(())
}
