//! Large Services are planned in parts, so that other Services can be planned in between.

use super::*;

/// Returns the ports `numbers` of Service `s`, all at one address and with these endpoints. The last port carries the
/// frontend of the address as such.
fn ports(numbers: std::ops::Range<u16>, backends: &[(u8, u32)]) -> Vec<DesiredPort> {
    let last = numbers.end.wrapping_sub(1);
    numbers
        .map(|number| {
            let mut port = port("s", TCP, &[exact(10, number, TCP)], backends);
            port.key.port_name = format!("p{number}").into();
            if number == last {
                port.frontends.push((FrontendKey::address(vip(10)), 0));
                port.frontends.sort_unstable();
            }
            port
        })
        .collect()
}

/// Brings `s` to these ports, part by part, and calls `look` with the meaning of the maps after each part.
fn becomes(bench: &mut Bench, ports: Vec<DesiredPort>, look: impl Fn(&Meaning)) {
    let service = service("s");
    let gone = ports_beside(&bench.model, &service, &ports);
    let wanted = ports.chunks(1).map(|ports| Part { created: 1, ports, gone: &[] });
    let removed = gone.chunks(1).map(|gone| Part { created: 1, ports: &[], gone });
    for part in wanted.chain(removed) {
        let plan = plan_part(&mut bench.model, &service, &part);
        assert_eq!(plan.refused, BTreeMap::new());
        plan.ops.iter().for_each(|op| bench.sim.apply(op).unwrap());
        bench.model.release(plan.freed);
        account(&bench.model, &Freed::default());
        look(&read(&bench.sim.contents()));
    }
    match ports.is_empty() {
        true => bench.services.remove(&service),
        false => bench
            .services
            .insert(service, Wanted { created: 1, desired: DesiredService { ports, problems: Vec::new() } }),
    };
    assert_eq!(read(&bench.sim.contents()), ought(&bench.services));
}

fn active(meaning: &Meaning) -> bool {
    meaning.frontends.contains_key(&FrontendKey::address(vip(10)))
}

fn served(meaning: &Meaning) -> usize {
    meaning.frontends.keys().filter(|key| key.port != Be16::new(0)).count()
}

#[test]
fn a_service_comes_changes_and_goes_in_parts() {
    let mut bench = Bench::new(ROOMY);
    bench.becomes(&[("t", web("t", 11, &[(1, HERE)]))]);
    // Unused ports of the clusterIP are refused only when all used ports are there.
    becomes(&mut bench, ports(1..6, &[(1, HERE)]), |now| assert_eq!(active(now), served(now) == 1 + 5));
    // Each port changes alone, and none is missing meanwhile.
    becomes(&mut bench, ports(1..6, &[(2, REMOTE)]), |now| assert_eq!((active(now), served(now)), (true, 6)));
    // Ports appear and disappear.
    becomes(&mut bench, ports(4..8, &[(2, REMOTE)]), |now| assert!(served(now) >= 5));
    let plan = bench.restart();
    assert_eq!(plan.ops, [], "a plan of all at once makes the same");
    becomes(&mut bench, Vec::new(), |now| assert!(served(now) >= 1));
    assert_eq!(served(&read(&bench.sim.contents())), 1, "the other one is served throughout");
}
