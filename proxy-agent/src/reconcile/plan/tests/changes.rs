//! Single changes: their cost, their order, and the state that they leave alone.

use proxy_common::abi::ServiceId;
use proxy_common::abi::frontend::flags::{EXTERNAL, NEAR_LOCAL};
use proxy_common::abi::local_address::{HOST, NODEPORT};
use proxy_common::addr::Prefix;

use super::*;

#[test]
fn a_new_service_is_whole_before_it_has_a_frontend() {
    let mut bench = Bench::new(ROOMY);
    let plan = bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, REMOTE), (3, DRAINING)]))]);
    let ops = ["+name", "backend", "backend", "backend", "2 slots", "1 slots", "service"];
    assert_eq!(outline(&plan)[..7], ops);
    // Unused ports are refused only after the used port is there.
    assert_eq!(outline(&plan)[7..], ["+10.96.0.10:80/TCP", "+address 10.96.0.10"]);
}

#[test]
fn a_service_without_endpoints_is_programmed_with_its_verdicts() {
    let mut bench = Bench::new(ROOMY);
    let plan = bench.becomes(&[("s", web("s", 10, &[]))]);
    assert_eq!(outline(&plan), ["+name", "service", "+10.96.0.10:80/TCP", "+address 10.96.0.10"]);
    let mut drop = web("s", 10, &[]);
    drop.as_mut().unwrap().desired.ports[0].empty_local = SlotRange::DROP;
    assert_eq!(outline(&bench.becomes(&[("s", drop)])), ["service"]);
    assert_eq!(bench.element("s").local, SlotRange::DROP);
}

#[test]
fn scaling_costs_the_new_endpoints_and_the_sets() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, REMOTE)])), ("t", web("t", 11, &[(1, HERE)]))]);
    let (id, one, two) = (bench.id("s"), bench.backend("s", 1), bench.backend("s", 2));

    let up = bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, REMOTE), (3, REMOTE)]))]);
    assert_eq!(outline(&up), ["backend", "3 slots", "service"]);
    let down = bench.becomes(&[("s", web("s", 10, &[(1, HERE)]))]);
    assert_eq!(outline(&down), ["1 slots", "service", "state 0x0", "state 0x0"]);
    let none = bench.becomes(&[("s", web("s", 10, &[]))]);
    assert_eq!(outline(&none), ["service", "state 0x0"]);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)]))]);
    assert_eq!(bench.id("s"), id);
    assert_ne!(bench.backend("s", 1), one, "the same id with another generation, or another id");
    assert_ne!(bench.backend("s", 1), two);
}

#[test]
fn nothing_is_written_when_nothing_has_changed() {
    let mut bench = Bench::new(ROOMY);
    let (s, t) = (sticky("s", 10, &[(1, HERE), (2, DRAINING)], 10), web("t", 10, &[]));
    bench.becomes(&[("s", s.clone()), ("t", t.clone())]);
    assert_eq!(bench.becomes(&[("s", s), ("t", t), ("u", None)]).ops, Vec::new());
    assert_eq!(bench.restart().ops, Vec::new());
}

#[test]
fn flags_of_an_endpoint_change_alone_while_its_sets_stay() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, REMOTE), (2, REMOTE)]))]);
    let before = bench.backend("s", 2);
    // Bits are added first and removed last: in between both count.
    let plan = bench.becomes(&[("s", web("s", 10, &[(1, REMOTE), (2, REMOTE | ON_THIS_NODE)]))]);
    assert_eq!(outline(&plan), ["state 0xd"]);
    let plan = bench.becomes(&[("s", web("s", 10, &[(1, REMOTE), (2, IN_CLUSTER)]))]);
    assert_eq!(outline(&plan), ["state 0x1"]);
    assert_eq!(bench.backend("s", 2), before);
    // A draining endpoint leaves the set first and loses its bits after that.
    let plan = bench.becomes(&[("s", web("s", 10, &[(1, DRAINING), (2, IN_CLUSTER)]))]);
    assert_eq!(outline(&plan), ["1 slots", "service", "state 0x4"]);
}

#[test]
fn flags_of_a_frontend_change_in_one_replacement() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)]))]);
    let mut local = web("s", 10, &[(1, HERE)]);
    for (_, flags) in local.iter_mut().flat_map(|wanted| &mut wanted.desired.ports[0].frontends) {
        *flags = NEAR_LOCAL;
    }
    let plan = bench.becomes(&[("s", local)]);
    // Ordered by kind: the clusterIP with its port, then the clusterIP as such.
    assert_eq!(outline(&plan), ["+10.96.0.10:80/TCP", "+address 10.96.0.10"]);
}

#[test]
fn a_removed_service_loses_its_frontends_first_and_its_name_last() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE), (2, REMOTE)]))]);
    let plan = bench.becomes(&[("s", None)]);
    let frontends = ["-address 10.96.0.10", "-10.96.0.10:80/TCP"];
    assert_eq!(outline(&plan)[..2], frontends);
    assert_eq!(outline(&plan)[2..], ["service", "state 0x0", "state 0x0", "-name"]);
}

#[test]
fn two_services_swap_their_addresses_in_one_replacement_each() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)])), ("t", web("t", 11, &[(2, HERE)]))]);
    let swapped = [("s", web("s", 11, &[(1, HERE)])), ("t", web("t", 10, &[(2, HERE)]))];
    let plan = bench.becomes(&swapped);
    assert_eq!(outline(&plan), ["+10.96.0.10:80/TCP", "+10.96.0.11:80/TCP"]);
}

#[test]
fn a_port_moves_to_another_service_and_to_another_name() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", web("s", 10, &[(1, HERE)])), ("t", web("t", 11, &[(2, HERE)]))]);
    let frontends = [exact(10, 80, TCP), exact(11, 80, TCP), FrontendKey::address(vip(11))];
    let both = wanted(1, vec![port("t", TCP, &frontends, &[(2, HERE)])]);
    let plan = bench.becomes(&[("s", None), ("t", both)]);
    assert_eq!(outline(&plan)[..2], ["+10.96.0.10:80/TCP", "-address 10.96.0.10"]);

    // A renamed port is another Service port with the same frontends.
    let id = bench.id("t");
    let mut renamed = port("t", TCP, &frontends, &[(2, HERE)]);
    renamed.key.port_name = "http".into();
    let plan = bench.becomes(&[("t", wanted(1, vec![renamed]))]);
    let ops =
        ["+name", "backend", "1 slots", "1 slots", "service", "+10.96.0.10:80/TCP", "+10.96.0.11:80/TCP"];
    assert_eq!(outline(&plan)[..7], ops);
    assert_eq!(outline(&plan)[7..], ["service", "state 0x0", "-name"]);
    assert_ne!(bench.id("t"), id);
}

#[test]
fn a_node_port_is_taken_over_without_a_gap_and_the_type_changes_nothing_else() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", with_node_port("s", 10))]);
    let plan = bench.becomes(&[("s", None), ("t", with_node_port("t", 11))]);
    let frontends: Vec<String> = outline(&plan).into_iter().filter(|op| op.contains("31080")).collect();
    assert_eq!(frontends, ["+nodePort 31080/TCP (IPv4)"]);

    let plan = bench.becomes(&[("t", web("t", 11, &[(11, HERE)]))]);
    assert_eq!(outline(&plan), ["-nodePort 31080/TCP (IPv4)"]);
    let plan = bench.becomes(&[("t", with_node_port("t", 11))]);
    assert_eq!(outline(&plan), ["+nodePort 31080/TCP (IPv4)"]);
}

fn with_node_port(name: &str, ip: u8) -> Option<Wanted> {
    let frontends = [exact(ip, 80, TCP), FrontendKey::address(vip(ip)), node_port(31_080, TCP)];
    let mut port = port(name, TCP, &frontends, &[(ip, HERE)]);
    port.frontends
        .iter_mut()
        .filter(|(key, _)| *key == frontends[2])
        .for_each(|(_, flags)| *flags = EXTERNAL);
    wanted(1, vec![port])
}

#[test]
fn affinity_that_is_switched_on_again_starts_from_nothing() {
    let mut bench = Bench::new(ROOMY);
    let mut epoch = |wanted| {
        bench.becomes(&[("s", wanted)]);
        bench.element("s").affinity
    };
    let backends = [(1, HERE)];
    let first = epoch(sticky("s", 10, &backends, 10));
    assert_eq!(epoch(sticky("s", 10, &backends, 20)).epoch, first.epoch, "another timeout forgets nobody");
    assert_eq!(epoch(sticky("s", 10, &[], 20)).epoch, first.epoch);
    assert_eq!(epoch(web("s", 10, &backends)).seconds, 0);
    let again = epoch(sticky("s", 10, &backends, 10));
    assert!(again.epoch > first.epoch, "{again:?} after {first:?}");

    // Another Service that gets the id has no remembered clients, either.
    let id = bench.id("s");
    bench.becomes(&[("s", None)]);
    bench.becomes(&[("t", sticky("t", 10, &backends, 10))]);
    assert_eq!(bench.id("t"), id);
    assert!(bench.element("t").affinity.epoch > again.epoch);
}

#[test]
fn an_endpoint_that_returns_has_a_new_generation() {
    let mut bench = Bench::new(ROOMY);
    let mut generation = |flags: Option<u32>| {
        let backends: Vec<(u8, u32)> =
            [(1, REMOTE)].into_iter().chain(flags.map(|flags| (2, flags))).collect();
        bench.becomes(&[("s", sticky("s", 10, &backends, 10))]);
        flags.map(|_| bench.backend("s", 2))
    };
    let first = generation(Some(HERE));
    // Clients stay remembered while the endpoint is in one of the sets. They are forgotten when it is in neither and
    // then enters a set.
    assert_eq!(generation(Some(REMOTE)), first);
    assert_eq!(generation(Some(HERE)), first);
    assert_eq!(generation(Some(DRAINING)), first);
    let second = generation(Some(REMOTE));
    assert_eq!(second.map(|(id, _)| id), first.map(|(id, _)| id));
    assert!(second > first);
    generation(None);
    let third = generation(Some(REMOTE));
    assert_eq!(third.map(|(id, _)| id), first.map(|(id, _)| id), "the lowest free number");
    assert!(third > second);
}

/// Anybody can write any externalIP into a Service of any age. An address that was given to another Service stays
/// with that Service.
#[test]
fn the_best_title_gets_a_frontend_and_age_counts_among_equals_only() {
    use proxy_common::abi::frontend::flags::{EXTERNAL, LOAD_BALANCER};
    let key = exact(10, 80, TCP);
    let titles = [("external", EXTERNAL), ("balancer", EXTERNAL | LOAD_BALANCER), ("cluster", 0)];
    let titles: Vec<(&str, i64, u16)> =
        titles.iter().zip(1..).map(|((name, flags), age)| (*name, age, *flags)).collect();
    // In several orders of arrival. The better the title, the younger the Service.
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
        let mut bench = Bench::new(ROOMY);
        for index in order {
            let (name, created, flags) = titles[index];
            let mut port = port(name, TCP, &[key], &[(1, HERE)]);
            port.frontends = vec![(key, flags)];
            bench.becomes(&[(name, wanted(created, vec![port]))]);
        }
        for (place, (name, ..)) in titles.iter().enumerate().rev() {
            assert_eq!(bench.model.frontends[&key].service, bench.id(name), "{order:?}");
            for (loser, ..) in &titles[..place] {
                let why =
                    if *name == "cluster" { "as its clusterIP" } else { "as its load-balancer address" };
                let lost = format!("10.96.0.10:80/TCP is not served: Service a/{name} has it {why}");
                assert_eq!(lost_claims(&bench.model, &service(loser)), [lost]);
            }
            bench.becomes(&[(name, None)]);
        }
    }
}

#[test]
fn the_oldest_service_gets_a_frontend_and_the_next_one_inherits_it() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("m", claims("m", 5))]);
    bench.becomes(&[("z", claims("z", 3))]);
    assert_eq!(owner(&bench), bench.id("z"), "older");
    bench.becomes(&[("a", claims("a", 3))]);
    assert_eq!(owner(&bench), bench.id("a"), "as old, and first by name");
    assert_eq!(
        lost_claims(&bench.model, &service("m")),
        ["10.96.0.10:80/TCP is not served: Service a/a has it and is older".to_owned()]
    );
    assert_eq!(lost_claims(&bench.model, &service("a")), Vec::<String>::new());
    // A change of one of these Services concerns the others. A newcomer concerns all of them, and nobody if it claims
    // another frontend.
    assert_eq!(concerned(&bench, "a", None), ["a/m", "a/z"]);
    assert_eq!(concerned(&bench, "new", claims("new", 1)), ["a/a", "a/m", "a/z"]);
    let elsewhere = wanted(1, vec![port("new", TCP, &[exact(11, 80, TCP)], &[(1, HERE)])]);
    assert_eq!(concerned(&bench, "new", elsewhere), Vec::<String>::new());

    // Each step is one replacement; the frontend never vanishes.
    for (gone, heir) in [("a", "z"), ("z", "m")] {
        let plan = bench.becomes(&[(gone, None)]);
        let frontends: Vec<String> = outline(&plan).into_iter().filter(|op| op.contains(':')).collect();
        assert_eq!(frontends, ["+10.96.0.10:80/TCP"]);
        assert_eq!(owner(&bench), bench.id(heir));
    }
    // A Service also loses its frontend by claiming another one, or by having become younger.
    bench.becomes(&[("a", claims("a", 1))]);
    assert_eq!(owner(&bench), bench.id("a"));
    bench.becomes(&[("a", web("a", 12, &[(1, HERE)]))]);
    assert_eq!(owner(&bench), bench.id("m"));
    bench.becomes(&[("a", claims("a", 1))]);
    bench.becomes(&[("a", claims("a", 9))]);
    assert_eq!(owner(&bench), bench.id("m"));
}

fn owner(bench: &Bench) -> ServiceId {
    bench.model.frontends[&exact(10, 80, TCP)].service
}

fn claims(name: &str, created: i64) -> Option<Wanted> {
    wanted(created, vec![port(name, TCP, &[exact(10, 80, TCP)], &[(1, HERE)])])
}

#[test]
fn udp_sockets_are_looked_at_when_their_backends_may_have_left() {
    let mut bench = Bench::new(ROOMY);
    let mut step = |name: &'static str, proto: u8, ip: u8, backends: Option<&[(u8, u32)]>| {
        let wanted =
            backends.and_then(|list| wanted(1, vec![port(name, proto, &[exact(ip, 53, proto)], list)]));
        bench.becomes(&[(name, wanted)]).udp_stale
    };
    let mut steps = Vec::new();
    for proto in [UDP, TCP] {
        steps.push([
            step("s", proto, 10, Some(&[])),
            step("s", proto, 10, Some(&[(1, REMOTE)])),
            step("s", proto, 10, Some(&[(1, REMOTE), (2, REMOTE)])),
            step("s", proto, 10, Some(&[(1, REMOTE), (2, DRAINING)])),
            step("s", proto, 10, Some(&[(1, REMOTE)])),
            step("s", proto, 10, Some(&[(1, IN_CLUSTER)])),
            step("s", proto, 10, None),
        ]);
    }
    // In order: no backend while sockets may be connected, the first backend, another one, one that drains and still
    // serves, one that leaves, one that stops serving, a Service that is deleted.
    let udp = [true, true, false, false, true, true, true];
    assert_eq!(steps, [udp, [false; 7]]);

    let mut bench = Bench::new(ROOMY);
    let [s, t] = [("s", 10), ("t", 11)]
        .map(|(name, ip)| wanted(1, vec![port(name, UDP, &[exact(ip, 53, UDP)], &[(ip, REMOTE)])]));
    bench.becomes(&[("s", s), ("t", t)]);
    let both = wanted(0, vec![port("t", UDP, &[exact(10, 53, UDP), exact(11, 53, UDP)], &[(11, REMOTE)])]);
    assert!(bench.becomes(&[("t", both)]).udp_stale, "a frontend has another owner");
}

#[test]
fn node_tables_gain_before_they_lose() {
    let mut model = Model::new(ROOMY);
    let mut node = |addresses: &[(u8, u32)], cidrs: &[u8], pods: &[u8]| {
        let addresses = addresses.iter().map(|(number, bits)| (vip(*number), *bits)).collect();
        let [cidrs, pods] = [cidrs, pods].map(|numbers| {
            numbers.iter().map(|number| Prefix::new(Addr::v4([10, *number, 0, 0]), 16).unwrap()).collect()
        });
        let wanted = NodeTables { addresses, service_cidrs: cidrs, pod_sources: pods };
        outline(&Plan { ops: plan_node(&mut model, wanted).0, ..Plan::default() })
    };
    let ops = ["+10.96.0.1", "+10.96.0.2", "+10.96.0.0/16", "+pods 10.64.0.0/16"];
    assert_eq!(node(&[(1, HOST), (2, HOST)], &[96], &[64]), ops);
    assert_eq!(node(&[(1, HOST), (2, HOST)], &[96], &[64]), Vec::<String>::new());
    let ops = ["+10.96.0.2", "+10.96.0.3", "-10.96.0.1", "+10.97.0.0/16", "-10.96.0.0/16"];
    let pods = ["+pods 10.65.0.0/16", "-pods 10.64.0.0/16"];
    assert_eq!(node(&[(2, HOST | NODEPORT), (3, HOST)], &[97], &[65]), [&ops[..], &pods].concat());
}

#[test]
fn source_ranges_are_there_before_a_frontend_asks_for_them_and_as_long_as_it_does() {
    let mut bench = Bench::new(ROOMY);
    let plan = bench.becomes(&[("s", guarded("s", 10, &[1, 2]))]);
    let ops =
        ["+name", "+203.0.1.0/24 for 1", "+203.0.2.0/24 for 1", "backend", "1 slots", "1 slots", "service"];
    assert_eq!(outline(&plan)[..7], ops);
    assert_eq!(outline(&plan)[7..], ["+10.96.0.10:80/TCP", "+address 10.96.0.10"]);
    assert_eq!(bench.becomes(&[("s", guarded("s", 10, &[1, 2]))]).ops, Vec::new());

    // New ranges: clients in a range of both versions are admitted all the time.
    let plan = bench.becomes(&[("s", guarded("s", 10, &[2, 3]))]);
    assert_eq!(outline(&plan), ["+203.0.3.0/24 for 1", "-203.0.1.0/24 for 1"]);
    let plan = bench.becomes(&[("s", guarded("s", 10, &[]))]);
    assert_eq!(outline(&plan), ["+10.96.0.10:80/TCP", "-203.0.2.0/24 for 1", "-203.0.3.0/24 for 1"]);
    let plan = bench.becomes(&[("s", guarded("s", 10, &[4]))]);
    assert_eq!(outline(&plan), ["+203.0.4.0/24 for 1", "+10.96.0.10:80/TCP"]);

    let plan = bench.becomes(&[("s", None)]);
    assert_eq!(outline(&plan)[2..], ["service", "state 0x0", "-203.0.4.0/24 for 1", "-name"]);
    // The next owner of the id has none of these ranges.
    bench.becomes(&[("t", web("t", 11, &[(1, HERE)]))]);
    assert_eq!(bench.id("t"), ServiceId(1));
}

#[test]
fn room_in_a_hash_is_told_of_without_numbers_to_give_back() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("s", guarded("s", 10, &[1, 2]))]);
    assert!(bench.change(&[("s", guarded("s", 10, &[1]))]).freed.room);
    let two = [exact(10, 80, TCP), exact(11, 80, TCP)];
    let plan = bench.change(&[("s", wanted(1, vec![port("s", TCP, &two, &[(1, HERE)])]))]);
    assert!(plan.freed.room, "{:?}", outline(&plan));
    let plan = bench.change(&[("s", wanted(1, vec![port("s", TCP, &two[..1], &[(1, HERE)])]))]);
    assert!(plan.freed.room && !plan.freed.is_empty());
    assert!(bench.change(&[("s", wanted(1, vec![port("s", TCP, &two, &[(1, HERE)])]))]).freed.is_empty());
}

#[test]
fn so_many_lost_frontends_are_named_and_the_others_counted() {
    let mut bench = Bench::new(ROOMY);
    let keys: Vec<_> = (10..30).map(|byte| exact(byte, 80, TCP)).collect();
    for (name, created) in [("old", 1), ("young", 2)] {
        bench.becomes(&[(name, wanted(created, vec![port(name, TCP, &keys, &[(1, HERE)])]))]);
    }
    let lost = lost_claims(&bench.model, &service("young"));
    assert_eq!(lost.len(), 17, "{lost:?}");
    assert_eq!(lost[0], "10.96.0.10:80/TCP is not served: Service a/old has it and is older");
    assert_eq!(lost[16], "4 more frontends are not served: other Services have them");
}
