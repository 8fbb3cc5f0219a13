//! Properties that hold for all packets, tested at random.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use proxy_common::abi::Nanos;
use proxy_common::datapath::edge::Verdict;
use proxy_tests::packets::random::{Step, Traffic, check};
use proxy_tests::packets::{BARE, ETHERNET, NEAR, NIC, OVERLAY, POD, World};

/// Returns the configuration: the same cases in every run.
fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0x7697_0a11),
        ..Config::default()
    }
}

fn send(world: &World, step: &Step) -> (Verdict, Vec<u8>) {
    let send = if step.egress { World::leave } else { World::enter };
    send(world, step.device, step.bytes.clone())
}

proptest! {
    #![proptest_config(config(400))]

    /// Clients, pods and routers send anything, in any order.
    #[test]
    fn traffic_is_translated_consistently(decisions in vec(any::<u8>(), 0..2500)) {
        let world = World::new().unwrap();
        let mut traffic = Traffic::new(&decisions);
        while let Some(step) = traffic.next() {
            world.pass(step.pause);
            let (verdict, bytes) = send(&world, &step);
            if let Err(what) = check(&world, &step, verdict, &bytes) {
                return Err(TestCaseError::fail(format!("{what}: {step:02x?} to {bytes:02x?}")));
            }
            traffic.note(&step, verdict, &bytes);
        }
        entries_lead_to_records(&world)?;
    }
}

proptest! {
    #![proptest_config(config(20_000))]

    /// Not even the headers are valid.
    #[test]
    fn noise_does_no_harm(
        device in prop::sample::select(vec![NIC, OVERLAY, POD, BARE, NEAR]),
        egress: bool,
        ethertype in prop::sample::select(vec![[0x08, 0x00], [0x86, 0xdd], [0x08, 0x06]]),
        first in prop::sample::select(vec![0x45, 0x46, 0x4f, 0x60, 0x00]),
        mut bytes in vec(any::<u8>(), 0..200),
    ) {
        if let [at, ..] = &mut bytes[..] {
            *at = first;
        }
        let bytes = [&[2; 12][..], &ethertype, &bytes].concat();
        assert!(bytes.len() >= ETHERNET);
        let world = World::new().unwrap();
        let step = Step { device, egress, bytes, pause: 0 };
        let (verdict, after) = send(&world, &step);
        if let Err(what) = check(&world, &step, verdict, &after) {
            return Err(TestCaseError::fail(format!("{what}: {step:02x?} to {after:02x?}")));
        }
    }
}

/// Checks that every record is reached from its VIP, and from its source of ours if it has one.
fn entries_lead_to_records(world: &World) -> Result<(), TestCaseError> {
    use proxy_common::datapath::edge::flows::{has_snat, snat_index, vip_index};
    use proxy_common::datapath::edge::tables::Tier;
    use proxy_common::datapath::edge::timeouts::expired;
    let now = world.sim.clock.get();
    for tier in [Tier::Assured, Tier::New] {
        let entries = world.sim.edge.entries(tier);
        for (key, flow) in world.sim.edge.records(tier) {
            if expired(&flow, key.proto, Nanos(now)) {
                continue;
            }
            prop_assert!(entries.contains(&vip_index(&key, &flow)), "{key:?} is not reached from its VIP");
            if has_snat(&flow) {
                let entry = snat_index(&key, &flow.snat, flow.snat_port);
                prop_assert!(entries.contains(&entry), "{key:?} is not reached from its source");
            }
        }
    }
    Ok(())
}
