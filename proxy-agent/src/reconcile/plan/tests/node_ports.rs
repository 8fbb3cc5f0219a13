//! Addresses of the node, where a frontend by address and port shadows a nodePort.

use proxy_common::abi::frontend::flags::{EXTERNAL, LOAD_BALANCER};
use proxy_common::abi::local_address::{HOST, NODEPORT};

use super::*;

/// Port 30080 of 10.96.0.1, an address of the node.
const HERE_30080: (u8, u16) = (1, 30_080);

fn at(name: &str, (ip, number): (u8, u16), proto: u8, flags: u16) -> Option<Wanted> {
    let mut port = port(name, proto, &[], &[(1, HERE)]);
    port.frontends = vec![(exact(ip, number, proto), EXTERNAL | flags)];
    wanted(1, vec![port])
}

fn by_node_port(created: i64, number: u16) -> Option<Wanted> {
    let mut port = port("n", TCP, &[], &[(2, HERE)]);
    port.frontends = vec![(node_port(number, TCP), EXTERNAL)];
    wanted(created, vec![port])
}

/// Plans the addresses of the host with their bits, and then the affected Services, as the agent does. Returns these
/// Services.
fn node(bench: &mut Bench, addresses: &[(u8, u32)]) -> Vec<String> {
    let addresses = addresses.iter().map(|(number, bits)| (vip(*number), *bits)).collect();
    let (ops, concerned) = plan_node(&mut bench.model, NodeTables { addresses, ..NodeTables::default() });
    ops.iter().for_each(|op| bench.sim.apply(op).unwrap());
    let again: BTreeMap<_, _> =
        concerned.iter().map(|key| (key.clone(), bench.services.get(key).cloned())).collect();
    bench.carry_out(&again, false);
    concerned.iter().map(ToString::to_string).collect()
}

fn is_served(bench: &Bench, key: FrontendKey) -> bool {
    let served = bench.sim.contents().frontends.iter().any(|(found, _)| *found == key);
    assert_eq!(served, bench.model.frontends.contains_key(&key));
    served
}

/// Returns the problems of `s` and of `n`.
fn lost(bench: &Bench) -> [Vec<String>; 2] {
    ["s", "n"].map(|name| lost_claims(&bench.model, &service(name)))
}

const NOTHING: [Vec<String>; 2] = [Vec::new(), Vec::new()];
const LOST: &str = "10.96.0.1:30080/TCP is not served: Service a/n has it as its nodePort";

#[test]
fn an_external_ip_takes_nobodys_node_port_whoever_comes_first() {
    let key = exact(1, 30_080, TCP);
    for external_first in [true, false] {
        let mut bench = Bench::new(ROOMY);
        node(&mut bench, &[(1, HOST | NODEPORT), (2, HOST)]);
        // The Service with the nodePort is the younger one.
        let mut changes = [("s", at("s", HERE_30080, TCP, 0)), ("n", by_node_port(5, 30_080))];
        if !external_first {
            changes.reverse();
        }
        for (name, wanted) in changes {
            let others = if bench.services.is_empty() { &[][..] } else { &["a/s", "a/n"] };
            let others = others.iter().filter(|other| !other.ends_with(name)).copied();
            assert_eq!(concerned(&bench, name, wanted.clone()), others.collect::<Vec<_>>());
            bench.change(&[(name, wanted)]);
        }
        assert!(!is_served(&bench, key) && is_served(&bench, node_port(30_080, TCP)));
        assert_eq!(lost(&bench), [vec![LOST.to_owned()], Vec::new()]);
        // The nodePort is gone, so the externalIP shadows nothing.
        bench.change(&[("n", by_node_port(5, 30_081))]);
        assert!(is_served(&bench, key));
        assert_eq!(lost(&bench), NOTHING);
    }
}

#[test]
fn only_that_port_at_addresses_that_serve_node_ports() {
    for (place, proto) in [((1, 30_081), TCP), (HERE_30080, UDP), ((2, 30_080), TCP), ((3, 30_080), TCP)] {
        let mut bench = Bench::new(ROOMY);
        node(&mut bench, &[(1, HOST | NODEPORT), (2, HOST)]);
        bench.change(&[("s", at("s", place, proto, 0)), ("n", by_node_port(5, 30_080))]);
        assert!(is_served(&bench, exact(place.0, place.1, proto)), "{place:?}");
        assert_eq!(lost(&bench), NOTHING, "{place:?}");
    }
}

/// The nodePort and the externalIP lead to the same Service.
#[test]
fn ones_own_node_port_takes_nothing() {
    let mut bench = Bench::new(ROOMY);
    node(&mut bench, &[(1, HOST | NODEPORT)]);
    let mut own = port("s", TCP, &[], &[(1, HERE)]);
    own.frontends = vec![(node_port(30_080, TCP), EXTERNAL), (exact(1, 30_080, TCP), EXTERNAL)];
    own.frontends.sort_unstable();
    bench.change(&[("s", wanted(1, vec![own]))]);
    assert!(is_served(&bench, exact(1, 30_080, TCP)));
    assert_eq!(lost(&bench), NOTHING);
}

#[test]
fn a_load_balancers_address_goes_before_node_ports_and_that_is_said() {
    let mut bench = Bench::new(ROOMY);
    node(&mut bench, &[(1, HOST | NODEPORT), (4, HOST | NODEPORT)]);
    bench.change(&[("s", at("s", HERE_30080, TCP, LOAD_BALANCER)), ("n", by_node_port(0, 30_080))]);
    assert!(is_served(&bench, exact(1, 30_080, TCP)) && is_served(&bench, node_port(30_080, TCP)));
    let told = "10.96.0.1:30080/TCP is not served: Service a/s has it as its load-balancer address";
    assert_eq!(lost(&bench), [Vec::new(), vec![told.to_owned()]]);
    assert_eq!(concerned(&bench, "s", None), ["a/n"]);
}

#[test]
fn addresses_of_the_node_come_and_go() {
    let key = exact(1, 30_080, TCP);
    let mut bench = Bench::new(ROOMY);
    node(&mut bench, &[(9, HOST | NODEPORT)]);
    bench.change(&[("s", at("s", HERE_30080, TCP, 0)), ("n", by_node_port(5, 30_080))]);
    assert!(is_served(&bench, key), "nobody's nodePort is served there");
    for (bits, served) in [(HOST | NODEPORT, false), (HOST, true), (HOST | NODEPORT, false)] {
        assert_eq!(node(&mut bench, &[(1, bits), (9, HOST | NODEPORT)]), ["a/s"]);
        assert_eq!(is_served(&bench, key), served, "{bits}");
        let told = if served { Vec::new() } else { vec![LOST.to_owned()] };
        assert_eq!(lost(&bench)[0], told, "{bits}");
        assert_eq!(node(&mut bench, &[(1, bits), (9, HOST | NODEPORT)]), [""; 0], "nothing has changed");
    }
    assert_eq!(node(&mut bench, &[(9, HOST | NODEPORT)]), ["a/s"]);
    assert!(is_served(&bench, key));
    // A restarted agent comes to the same result.
    node(&mut bench, &[(1, HOST | NODEPORT)]);
    let before = bench.sim.contents().frontends;
    bench.restart();
    assert!(!is_served(&bench, key));
    assert_eq!(bench.sim.contents().frontends, before);
    bench.change(&[("s", None), ("n", None)]);
    assert!(bench.model.beside_node_ports.is_empty() && bench.model.claims.is_empty());
}
