//! Session affinity of packets: the clients that a flood of forged clients can make the datapath forget, and those
//! that it cannot.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::ServiceId;
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use proxy_common::abi::flow::state::ASSURED;
use proxy_common::datapath::edge::parsed::tcp::{ACK, RST, SYN};
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{NIC, Net, Packet, World};

use super::{answer, open, record, reply, seen, translated, world};

/// Number of connections that shows a random pick among three.
const MANY: u16 = 30;

fn sticky(net: Net) -> World {
    let mut world = world();
    let mut service = world.sim.service(ServiceId(net.spread_id())).unwrap();
    service.affinity.seconds = 100;
    world.sim.apply(&Op::Service(ServiceId(net.spread_id()), service)).unwrap();
    world
}

/// Returns the backends of so many connections of a client.
fn backends(world: &World, net: Net, client: SocketAddr) -> BTreeSet<SocketAddr> {
    (0..MANY)
        .map(|number| {
            let from = SocketAddr::new(client.ip(), 50_000 + number);
            let request = Packet::tcp(from, net.spread(), SYN, 1000, 0);
            seen(&translated(world.enter(NIC, request.bytes()))).destination
        })
        .collect()
}

/// A client that has sent another packet after the reply is remembered apart from forged clients, by TCP and UDP.
/// Before that, it is remembered among them.
#[test]
fn who_has_shown_to_be_there_is_not_forgotten() {
    for net in Net::ALL {
        for udp in [false, true] {
            let (world, client, vip) = (sticky(net), net.client(), net.spread());
            let first = match udp {
                true => Packet::udp(client, vip, b"?"),
                false => Packet::tcp(client, vip, SYN, 1000, 0),
            };
            let (sent, own) = open(&world, &first);
            let backend = seen(&sent).destination;
            assert_eq!(known(&world), (0, 1));
            answer(&world, &reply(&first, backend, own));
            assert_eq!(known(&world), (0, 1));
            if udp {
                open(&world, &first);
            } else {
                open(&world, &Packet::tcp(client, vip, ACK, 1001, 5001));
            }
            assert_eq!(known(&world), (1, 1));

            // The flood has evicted every new client.
            world.sim.new_clients.borrow_mut().clear();
            assert_eq!(backends(&world, net, client), BTreeSet::from([backend]));
            // The forged packets have left no other trace of the client.
            assert_eq!(known(&world), (1, 0));
            // A client that is not known may be forgotten.
            let stranger = net.stranger();
            assert_eq!(backends(&world, net, stranger).len(), 1);
            assert_eq!(known(&world), (1, 1));
        }
    }
}

fn known(world: &World) -> (usize, usize) {
    (world.sim.clients.borrow().len(), world.sim.new_clients.borrow().len())
}

/// A client that resets its connection before it has acknowledged the reply is not remembered as proven; nor is a
/// client of a Service without session affinity.
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

/// A client is remembered at the backend of its connection, or not at all: another backend may have got the same
/// number meanwhile, or the backend may have left every set.
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
