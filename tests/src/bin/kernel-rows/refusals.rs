//! Connections that are refused, and packets that are dropped.

use anyhow::Result;
use proxy_tests::lab::Proto;
use proxy_tests::scenarios::{denial, refusal};

use super::checks::{Answer, WAYS, denied, fails, served, silent};
use super::kernel;
use super::objects::{HERE, balancer, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::world::{ABSENT, EMPTY, GUARDED, ON_THIS_NODE, World, X};

pub(super) const ROWS: &[Row] = &[
    Row { id: "k025_reject_at_sockets", check: reject_at_sockets },
    Row { id: "k026_drop_at_sockets", check: drop_at_sockets },
    Row { id: "k027_reject_packets", check: reject_packets },
    Row { id: "k028_drop_packets", check: drop_packets },
    Row { id: "k029_source_ranges", check: source_ranges },
];

/// Address in the Service range that no Service has.
const INACTIVE: [&str; 2] = ["10.96.77.77:80", "[fd00:96::77]:80"];
/// Port that no Service has.
const UNUSED: u16 = 999;

/// Checks, without an endpoint or without such a port, that the call that names the destination fails.
fn reject_at_sockets(world: &World) -> Result<Outcome> {
    for v6 in [false, true] {
        let (empty, unused) = (cluster_ip(EMPTY.number, v6, 80), cluster_ip(ON_THIS_NODE.number, v6, UNUSED));
        for way in WAYS {
            denied(&world.pod("P"), way, &unused, refusal())?;
            host_is_refused(world, way, &unused, refusal())?;
            if way != Proto::Udp {
                denied(&world.pod("P"), way, &empty, refusal())?;
                host_is_refused(world, way, &empty, refusal())?;
            }
        }
        // connect() of UDP does not fail without endpoints; the datagrams do.
        for place in [&world.pod("P"), world.host()] {
            fails(place, Proto::Udp, &empty, &["send", "recv"], "ECONNREFUSED")?;
        }
    }
    if kernel::has_set_retval() {
        right(refusal())
    } else {
        Ok(Outcome::Lacks(format!("bpf_set_retval: {} instead of ECONNREFUSED for pods", refusal())))
    }
}

/// Checks that the host's call is refused with `error`. Where the kernel cannot return `error` there, a TCP socket is
/// refused by an answer to its packet, never with EPERM, after which NFS would retry forever.
fn host_is_refused(world: &World, way: Proto, target: &str, error: &str) -> Result<()> {
    if way == Proto::Tcp && !kernel::has_set_retval() {
        fails(world.host(), way, target, &["connect"], "ECONNREFUSED")
    } else {
        denied(world.host(), way, target, error)
    }
}

/// Checks, without an endpoint on this node where the policy asks for one or without such a Service, that the host's
/// call fails and that a pod's packets are dropped.
fn drop_at_sockets(world: &World) -> Result<Outcome> {
    let pod = world.pod("P");
    let mut vanish = Vec::new();
    for v6 in [false, true] {
        for target in [cluster_ip(ABSENT.number, v6, 80), INACTIVE[usize::from(v6)].to_owned()] {
            vanish.extend(WAYS.map(|way| (&pod, way, target.clone())));
        }
        let absent = cluster_ip(ABSENT.number, v6, 80);
        for way in WAYS.into_iter().filter(|way| *way != Proto::Udp) {
            host_is_refused(world, way, &absent, denial())?;
        }
        fails(world.host(), Proto::Udp, &absent, &["send", "recv"], "ECONNREFUSED")?;
        host_is_refused(world, Proto::Tcp, INACTIVE[usize::from(v6)], denial())?;
    }
    silent(&vanish)?;
    if kernel::has_set_retval() {
        right(format!("{} for the host, silence for a pod", denial()))
    } else {
        right("a reset for the host by TCP, EPERM or ECONNREFUSED by UDP, silence for a pod")
    }
}

/// Checks that packets from outside, and from a pod whose packets are served, are answered with a reset or an ICMP
/// error.
fn reject_packets(world: &World) -> Result<Outcome> {
    let (outside, pod) = (world.lab().client("X"), world.pod("U"));
    for v6 in [false, true] {
        for (place, target) in [
            (&outside, balancer(EMPTY.number, v6, 80)),
            (&outside, node_port(EMPTY.number, v6, 80)),
            (&outside, cluster_ip(ON_THIS_NODE.number, v6, UNUSED)),
            (&pod, cluster_ip(EMPTY.number, v6, 80)),
        ] {
            fails(place, Proto::Tcp, &target, &["connect"], "ECONNREFUSED")?;
            fails(place, Proto::Udp, &target, &["send", "recv"], "ECONNREFUSED")?;
        }
    }
    right("from outside and from a pod, by TCP and UDP")
}

fn drop_packets(world: &World) -> Result<Outcome> {
    let (outside, pod) = (world.lab().client("X"), world.pod("U"));
    let mut vanish = Vec::new();
    for v6 in [false, true] {
        for (place, target) in [
            (&outside, balancer(ABSENT.number, v6, 80)),
            (&outside, INACTIVE[usize::from(v6)].to_owned()),
            (&pod, cluster_ip(ABSENT.number, v6, 80)),
        ] {
            vanish.extend([Proto::Tcp, Proto::UdpUnconnected].map(|way| (place, way, target.clone())));
        }
    }
    silent(&vanish)?;
    right("from outside and from a pod, by TCP and UDP")
}

/// Checks the source ranges of the load-balancer address: X is in the ranges; Y and the host are not.
fn source_ranges(world: &World) -> Result<Outcome> {
    let [x, y] = ["X", "Y"].map(|name| world.lab().client(name));
    for v6 in [false, true] {
        let target = balancer(GUARDED.number, v6, 80);
        served(&x, Proto::Tcp, &target, Answer::from(HERE, &X))?;
        silent(&[(&y, Proto::Tcp, target.clone())])?;
        denied(world.host(), Proto::Tcp, &target, denial())?;
        // The ranges apply to that address only.
        served(&y, Proto::Tcp, &node_port(GUARDED.number, v6, 80), Answer::from(HERE, &super::world::Y))?;
    }
    right("one client is in range, one and the host are not")
}
