//! Session affinity of packets: whom a flood of forged clients can have forgotten, and whom not.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use proxy_common::abi::flow::state::ASSURED;
use proxy_common::datapath::edge::parsed::tcp::{ACK, RST, SYN};
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{NIC, Net, Packet, World};

use super::{answer, open, record, reply, seen, translated, world};

/// Connections that show a pick at random among three.
const MANY: u16 = 30;

fn sticky(net: Net) -> World {
    let mut world = world();
    let mut service = world.sim.service(net.spread_id()).unwrap();
    service.affinity.seconds = 100;
    world.sim.apply(&Op::Service(net.spread_id(), service)).unwrap();
    world
}

/// The backends of so many connections of a client.
fn backends(world: &World, net: Net, client: SocketAddr) -> BTreeSet<SocketAddr> {
    (0..MANY)
        .map(|number| {
            let from = SocketAddr::new(client.ip(), 50_000 + number);
            let request = Packet::tcp(from, net.spread(), SYN, 1000, 0);
            seen(&translated(world.enter(NIC, request.bytes()))).destination
        })
        .collect()
}

/// A client that has gone on after an answer is remembered where nobody's forged packets are, by TCP and UDP; before that, among
/// them.
#[test]
fn who_has_shown_to_be_there_is_not_forgotten() {
    for net in Net::ALL {
        for udp in [false, true] {
            let (world, client, vip) = (sticky(net), net.client(), net.spread());
            let first = |kind| {
                if udp { Packet::udp(client, vip, b"?") } else { Packet::tcp(client, vip, kind, 1000, 0) }
            };
            let (sent, own) = open(&world, &first(SYN));
            let backend = seen(&sent).destination;
            let known = || (world.sim.clients.borrow().len(), world.sim.new_clients.borrow().len());
            assert_eq!(known(), (0, 1));
            answer(&world, &reply(&first(SYN), backend, own));
            assert_eq!(known(), (0, 1));
            if udp {
                open(&world, &first(0));
            } else {
                open(&world, &Packet::tcp(client, vip, ACK, 1001, 5001));
            }
            assert_eq!(known(), (1, 1));

            // The flood.
            world.sim.new_clients.borrow_mut().clear();
            assert_eq!(backends(&world, net, client), BTreeSet::from([backend]));
            // What is forged in its name is remembered nowhere else.
            assert_eq!(known(), (1, 0));
            // Of whom nothing is known, the memory may go.
            let stranger = net.stranger();
            assert_eq!(backends(&world, net, stranger).len(), 1);
            assert_eq!(known(), (1, 1));
        }
    }
}

/// A client that ends its connection before it has gone on is not there; nor is one whose Service has no session affinity.
#[test]
fn nobody_else_is_remembered() {
    for net in Net::ALL {
        let (world, client, vip) = (sticky(net), net.client(), net.spread());
        let (sent, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        answer(&world, &Packet::tcp(seen(&sent).destination, own, SYN | ACK, 5000, 1001));
        open(&world, &Packet::tcp(client, vip, RST, 1001, 0));
        assert!(world.sim.clients.borrow().is_empty());

        let other = super::world();
        super::establish(&other, net, net.there());
        assert!(other.sim.clients.borrow().is_empty() && other.sim.new_clients.borrow().is_empty());
    }
}

/// A client is remembered at the backend of its connection, or not at all: another one may have got its number meanwhile, or it
/// may have left every set.
#[test]
fn nobody_is_remembered_elsewhere() {
    for net in Net::ALL {
        for left in [false, true] {
            let (mut world, client, vip) = (sticky(net), net.client(), net.spread());
            let (sent, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
            answer(&world, &Packet::tcp(seen(&sent).destination, own, SYN | ACK, 5000, 1001));
            let id = record(&world).2.backend;
            let mut backend = world.sim.backend(id).unwrap();
            if left {
                backend.state.flags &= !(IN_CLUSTER | IN_LOCAL);
            } else {
                backend.addr = net.stranger().ip().into();
            }
            world.sim.apply(&Op::Backend(id, backend)).unwrap();
            open(&world, &Packet::tcp(client, vip, ACK, 1001, 5001));
            assert!(record(&world).2.state & ASSURED != 0 && world.sim.clients.borrow().is_empty());
        }
    }
}
