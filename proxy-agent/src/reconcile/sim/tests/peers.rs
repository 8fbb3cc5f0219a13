//! One UDP socket with several peers: backends by their own address, several VIPs, and connections that end or fail.

use proxy_common::abi::{BackendId, ServiceId};

use super::datagrams::{FROM_VIP, receive, send};
use super::*;

/// Receives a datagram from this address and returns the source that the application sees.
fn seen_from(sim: &Simulator, to: &SimSocket<'_>, (addr, port): (Addr, u16)) -> (Addr, u16) {
    let mut socket = SimSocket { addr, port: Be16::new(port), ..to.clone() };
    recvmsg(&mut socket, sim);
    (socket.addr, socket.port.get())
}

/// Sends a datagram to a pod by its own address.
#[track_caller]
fn send_itself(sim: &Simulator, from: &mut SimSocket<'_>, id: BackendId) {
    let mut socket = SimSocket { addr: pod(id.0), port: Be16::new(8080), ..from.clone() };
    assert_eq!(sendmsg(&mut socket, sim), Pass);
    from.record = socket.record;
}

#[test]
fn who_sends_to_a_backend_itself_sees_its_answers_and_those_of_other_backends_as_before() {
    for others_first in [false, true] {
        let mut sim = world();
        frontend(&mut sim, exact(vip(11), 80, UDP), ServiceId(1), 0);
        let mut from = socket(vip(10), 80, UDP);
        let first = send(&sim, &mut from);
        from.addr = vip(11);
        let second = send(&sim, &mut from);
        assert_ne!(first, second, "another VIP gets another backend while there is one");
        let ended = if others_first { second } else { first };
        let (kept, vip_of_kept) = if others_first { (first, vip(10)) } else { (second, vip(11)) };
        send_itself(&sim, &mut from, ended);
        assert_eq!(receive(&sim, &from, ended), (pod(ended.0), 8080));
        assert_eq!(receive(&sim, &from, kept), (vip_of_kept, 80));
        // After another request to the VIP, replies come from the VIP again.
        from.addr = if others_first { vip(11) } else { vip(10) };
        let again = send(&sim, &mut from);
        assert_eq!(receive(&sim, &from, again), (from.addr, 80));
        assert_eq!(receive(&sim, &from, kept), (vip_of_kept, 80));
    }
    // A socket that has sent to no other VIP has no record any more.
    let sim = world();
    let mut from = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut from);
    send_itself(&sim, &mut from, BackendId(id.0 % 3 + 1));
    assert_eq!(receive(&sim, &from, id), FROM_VIP(), "another backend's address ends nothing");
    send_itself(&sim, &mut from, id);
    assert_eq!(from.record, None);
}

#[test]
fn every_vip_of_a_socket_has_a_backend_of_its_own_while_there_are_enough() {
    let mut sim = world();
    for number in 11..=13 {
        frontend(&mut sim, exact(vip(number), 80, UDP), ServiceId(1), 0);
    }
    for cookie in 0..50 {
        let mut from = SimSocket { cookie, ..socket(vip(10), 80, UDP) };
        let mut backends = BTreeSet::new();
        for number in 10..=12 {
            from.addr = vip(number);
            backends.insert(send(&sim, &mut from));
        }
        assert_eq!(backends.len(), 3);
        // No backend is left for the fourth VIP, so it shares one. Replies of that backend then come from the fourth
        // VIP.
        from.addr = vip(13);
        let id = send(&sim, &mut from);
        assert_eq!(receive(&sim, &from, id), (vip(13), 80));
    }
}

#[test]
fn a_connected_socket_that_sends_to_its_vip_sends_to_its_peer() {
    let sim = world();
    for cookie in 0..20 {
        let mut from = SimSocket { cookie, ..socket(vip(10), 80, UDP) };
        assert_eq!(connect(&mut from, &sim), Translated);
        from.peer = (from.addr, from.port);
        let peer = backend_of(&from);
        from.addr = vip(10);
        from.port = Be16::new(80);
        assert_eq!(send(&sim, &mut from), peer, "the kernel throws away what another one answers");
    }
}

#[test]
fn a_socket_that_is_connected_to_the_vip_itself_is_left_to_packets() {
    let sim = world();
    let was = SimSocket { peer: (vip(10), Be16::new(80)), ..socket(vip(10), 80, UDP) };
    let mut from = was.clone();
    assert_eq!(sendmsg(&mut from, &sim), Pass);
    assert_eq!(from, was, "what a backend answered would be thrown away");
}

#[test]
fn a_record_counts_while_the_socket_is_connected_where_it_says() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(11), 80, UDP), ServiceId(1), 0);
    let mut first = socket(vip(10), 80, UDP);
    connect(&mut first, &sim);
    first.peer = (first.addr, first.port);
    let id = backend_of(&first);

    // connect(AF_UNSPEC), which no hook sees: datagrams that the pod sends on its own are shown with their own
    // source.
    let mut disconnected = SimSocket { peer: (Addr::ZERO, Be16::new(0)), ..first.clone() };
    assert_eq!(receive(&sim, &disconnected, id), (pod(id.0), 8080));
    // The socket sends like a socket that is not connected.
    (disconnected.addr, disconnected.port) = (vip(10), Be16::new(80));
    let mut sent = disconnected.clone();
    assert_eq!(sendmsg(&mut sent, &sim), Translated);
    assert!(!sent.record.unwrap().is_connected());
    assert_eq!(
        receive(&sim, &SimSocket { record: sent.record, ..disconnected }, backend_of(&sent)),
        FROM_VIP()
    );

    // A second connect() that the hook allows and the kernel then fails: to another VIP, and to another host.
    for (addr, verdict) in [(vip(11), Translated), (Addr::v4([192, 0, 2, 77]), Pass)] {
        let mut second = SimSocket { addr, port: Be16::new(80), ..first.clone() };
        assert_eq!(connect(&mut second, &sim), verdict);
        if verdict == Translated && backend_of(&second) == id {
            continue;
        }
        let mut asked = SimSocket { addr: pod(id.0), port: Be16::new(8080), ..second.clone() };
        assert_eq!(peername(&mut asked, &sim), Translated);
        assert_eq!((asked.addr, asked.port.get()), FROM_VIP());
        assert_eq!(seen_from(&sim, &second, (pod(id.0), 8080)), FROM_VIP());
        // If the second connect() succeeds, the new peer is shown.
        second.peer = (second.addr, second.port);
        let shown = if verdict == Translated { (vip(11), 80) } else { (addr, 80) };
        assert_eq!(seen_from(&sim, &second, (second.addr, second.port.get())), shown);
    }
}
