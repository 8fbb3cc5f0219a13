//! Functions run by the fuzzers (`fuzz/`), and by the replay of their corpus in the test suite. Each function panics
//! when a property does not hold.

use super::random::{Step, Traffic, check};
use super::world::{NIC, OVERLAY, POD, World};

/// Runs the traffic that follows from `data`.
///
/// # Panics
/// If a packet violates a property that holds for every packet.
pub fn traffic(data: &[u8]) {
    let world = World::new().expect("ordered maps take everything");
    let mut traffic = Traffic::new(data);
    while let Some(step) = traffic.next() {
        world.pass(step.pause);
        let (verdict, bytes) = send(&world, &step);
        traffic.note(&step, verdict, &bytes);
    }
}

/// Runs `data` as a packet without its Ethernet addresses, which enters and leaves everywhere. The first byte chooses
/// where.
///
/// # Panics
/// As [`traffic`].
pub fn packet(data: &[u8]) {
    let Some((&choice, bytes)) = data.split_first() else { return };
    let world = World::new().expect("ordered maps take everything");
    let device = [NIC, OVERLAY, POD, NIC][usize::from(choice & 3)];
    let ethertype = if choice & 4 == 0 { [0x08, 0x00] } else { [0x86, 0xdd] };
    let bytes = [&[2; 12][..], &ethertype, bytes].concat();
    let enters = Step { device, egress: false, bytes, pause: 0 };
    let (_, bytes) = send(&world, &enters);
    for device in [NIC, OVERLAY, POD] {
        send(&world, &Step { device, egress: true, bytes: bytes.clone(), pause: 0 });
    }
}

fn send(world: &World, step: &Step) -> (proxy_common::datapath::edge::Verdict, Vec<u8>) {
    let send = if step.egress { World::leave } else { World::enter };
    let (verdict, bytes) = send(world, step.device, step.bytes.clone());
    if let Err(what) = check(world, step, verdict, &bytes) {
        unreachable!("{what}: {step:02x?} to {verdict:?} {bytes:02x?}");
    }
    (verdict, bytes)
}
