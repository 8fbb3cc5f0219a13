//! The packet edge's programs in the kernel against the same pipeline on the host: the same maps, the same packets,
//! compared byte for byte, verdict for verdict and map for map.
//!
//! Source ports are drawn at random, so the host takes the port that the kernel has drawn. Every other decision
//! follows from the packets, since all Services here have one backend.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_agent::host::clock::now;
use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::flow::state::ASSURED;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{Counter, Flow, Nanos};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::flows::has_snat;
use proxy_common::datapath::edge::tables::Tier;
use proxy_common::datapath::edge::timeouts::expired;
use proxy_tests::packets::kernel::{Action, Flows, Form, Kernel, Ran, VERIFIER_LIMIT};
use proxy_tests::packets::random::{Step, Traffic, check};
use proxy_tests::packets::{ETHERNET, NIC, Net, OVERLAY, Packet, Trouble, World, read};

/// Number of packets in all.
const PACKETS: usize = 12_000;
/// Number of random bytes that decide the packets of one sequence.
const DECISIONS: usize = 3_000;

/// Counters that must be counted now and then in so many packets.
const COUNTED: [Counter; 13] = [
    Counter::Flow,
    Counter::IcmpError,
    Counter::RejectNoEndpoint,
    Counter::RejectUnusedPort,
    Counter::DropNoLocalEndpoint,
    Counter::DropInactiveAddress,
    Counter::DropSourceRange,
    Counter::DropNoFlow,
    Counter::DropNoSource,
    Counter::DropFragment,
    Counter::DropMalformed,
    Counter::DropRedirect,
    Counter::DropOwnSource,
];

#[test]
fn the_verifier_needs_less_than_half_of_what_it_has() -> Result<()> {
    let kernel = Kernel::new()?;
    for (name, instructions) in &kernel.verified {
        let instructions = instructions.with_context(|| format!("{name}: the kernel does not tell"))?;
        println!("{name}: {instructions} instructions verified");
        ensure!(instructions <= VERIFIER_LIMIT / 2, "{name}: {instructions} instructions");
    }
    Ok(())
}

#[test]
fn host_and_kernel_do_the_same() -> Result<()> {
    compare(Form::Plain)
}

/// Packets as they come from network cards that have computed the sum (`CHECKSUM_COMPLETE`). The kernel reports a
/// wrong sum afterwards.
#[test]
fn host_and_kernel_do_the_same_with_sums() -> Result<()> {
    compare(Form::Summed)
}

fn compare(form: Form) -> Result<()> {
    let mut kernel = Kernel::new()?;
    kernel.inside(|kernel| {
        let mut seed = 1;
        let mut tally = Tally::new();
        let mut packets = 0;
        while packets < PACKETS {
            packets += sequence(kernel, seed, form, &mut tally).with_context(|| format!("seed {seed}"))?;
            seed += 1;
        }
        println!("{packets} packets in {} sequences: {tally:?}", seed - 1);
        // A generator that makes only noise would compare nothing.
        let families = ["v4", "v6"];
        let verdicts = ["Pass", "Translated", "Drop", "Reply"];
        for what in verdicts.iter().flat_map(|verdict| families.map(|family| format!("{verdict} {family}"))) {
            let count = tally.get(&what).copied().unwrap_or(0);
            ensure!(count > PACKETS / 100, "only {count} times {what}");
        }
        for what in COUNTED.map(Counter::name).into_iter().chain(["assured", "with a source of ours"]) {
            let count = tally.get(what).copied().unwrap_or(0);
            ensure!(count >= 10, "only {count} times {what}");
        }
        Ok(())
    })
}

/// Datagrams that are sent, or were received, together stay in one piece within the kernel. So does their refusal.
#[test]
fn a_train_of_datagrams_is_refused() -> Result<()> {
    Kernel::new()?.inside(|kernel| {
        for net in Net::ALL {
            let datagram = Packet::udp(net.client(), net.nobody(), &[7; 600]).bytes();
            let ran = kernel.packet(NIC, false, &datagram, Form::Train)?;
            let Ran::Done(Action::Redirected, told) = ran else { bail!("{net:?}: {ran:?}") };
            let told = read(&told)?;
            ensure!(told.icmp == Some(Trouble::PortUnreachable.numbers(net.v6)), "{told:?}");
        }
        Ok(())
    })
}

/// On a machine that has just started, every flow that has not been used for long is older than the machine.
#[test]
fn flows_may_be_older_than_the_machine() -> Result<()> {
    Kernel::new()?.inside(|kernel| {
        for net in Net::ALL {
            for seconds in [1, 3 * 86_400] {
                kernel.forget()?;
                let request = Packet::udp(net.client(), net.there(), b"?").bytes();
                let ran = kernel.packet(NIC, false, &request, Form::Plain)?;
                let Ran::Done(Action::GoesOn, routed) = ran else { bail!("{net:?}: {ran:?}") };
                kernel.age(now().0 + seconds * 1_000_000_000)?;
                let [_, new] = kernel.flows()?.records;
                let [flow] = new.values().collect::<Vec<_>>()[..] else { bail!("{net:?}: {new:?}") };
                ensure!(flow.last_seen > now(), "{net:?}: {flow:?}");
                let lives = !expired(flow, UDP, now());
                let ran = kernel.packet(OVERLAY, true, &routed, Form::Plain)?;
                let Ran::Done(Action::GoesOn, sent) = ran else { bail!("{net:?}: {ran:?}") };
                // An expired flow counts as none.
                ensure!((sent != routed) == lives, "{net:?}, {seconds} s: lives: {lives}, {flow:?}");
            }
        }
        Ok(())
    })
}

type Tally = BTreeMap<String, usize>;

/// Runs one sequence of packets on empty flow maps. Returns the number of packets.
fn sequence(kernel: &mut Kernel, seed: u64, form: Form, tally: &mut Tally) -> Result<usize> {
    kernel.forget()?;
    let counted = kernel.counts()?;
    let world = World::new()?;
    let decisions = noise(seed);
    let mut traffic = Traffic::new(&decisions);
    let mut packets = 0;
    while let Some(step) = traffic.next() {
        if step.pause > 0 {
            world.pass(step.pause);
            kernel.age(step.pause * 1_000_000_000)?;
        }
        packets += 1;
        let name = || format!("packet {packets}: {step:02x?}");
        let (verdict, bytes) = one(kernel, &world, &step, form).with_context(name)?;
        check(&world, &step, verdict, &bytes).map_err(anyhow::Error::msg).with_context(name)?;
        let family = if step.bytes.get(12..14) == Some(&[0x86, 0xdd]) { "v6" } else { "v4" };
        *tally.entry(format!("{verdict:?} {family}")).or_default() += 1;
        traffic.note(&step, verdict, &bytes);
    }
    for ((counter, before), after) in Counter::ALL.into_iter().zip(counted).zip(kernel.counts()?) {
        let (host, kernel) = (world.sim.counted(counter), after - before);
        ensure!(host == kernel, "{}: {host} times on the host, {kernel} in the kernel", counter.name());
    }
    for counter in COUNTED {
        *tally.entry(counter.name().to_owned()).or_default() += world.sim.counted(counter) as usize;
    }
    let Flows { records: [assured, new], .. } = host_flows(&world);
    *tally.entry("assured".to_owned()).or_default() += assured.len();
    let sources = assured.values().chain(new.values()).filter(|flow| has_snat(flow)).count();
    *tally.entry("with a source of ours".to_owned()).or_default() += sources;
    Ok(packets)
}

fn one(kernel: &Kernel, world: &World, step: &Step, form: Form) -> Result<(Verdict, Vec<u8>)> {
    let before = host_flows(world);
    let ran = kernel.packet(step.device, step.egress, &step.bytes, form)?;
    let after = kernel.flows()?;
    world.sim.fixed_random.set(drawn(&before, &after));
    let send = if step.egress { World::leave } else { World::enter };
    let (verdict, host) = send(world, step.device, step.bytes.clone());
    match ran {
        Ran::Done(action, bytes) => {
            ensure!(action == Action::of(verdict), "{verdict:?} on the host, {action:?} in the kernel");
            let mut host = host.clone();
            if verdict == Verdict::Reply {
                // The kernel itself decides the way back.
                host[..12].rotate_left(6);
            }
            ensure!(host == bytes, "{verdict:?}, on the host\n{host:02x?}, in the kernel\n{bytes:02x?}");
        }
        // The kernel does not keep the sum when a packet gets another end. That happens when the quotation in an ICMP
        // error is not exactly the packet that it is about.
        Ran::WrongSum => {
            let seen = read(&host)?;
            let own = if seen.source.is_ipv6() { 48 } else { 28 };
            let has_other_end =
                verdict == Verdict::Reply && seen.icmp.is_some() && host.len() != step.bytes.len() + own;
            ensure!(has_other_end, "{verdict:?}: the sum over the packet is wrong");
        }
        Ran::Refused => {
            let header = if step.bytes.get(12..14) == Some(&[0x86, 0xdd]) { 40 } else { 20 };
            let len = step.bytes.len();
            ensure!(
                len < ETHERNET + header && verdict == Verdict::Pass,
                "{verdict:?}, refused by the kernel"
            );
        }
    }
    let out = host;
    let (host, kernel) = (timeless(host_flows(world)), timeless(after));
    ensure!(host == kernel, "flows on the host\n{host:#?}, in the kernel\n{kernel:#?}");
    Ok((verdict, out))
}

fn host_flows(world: &World) -> Flows {
    let edge = &world.sim.edge;
    Flows {
        records: [Tier::Assured, Tier::New].map(|tier| edge.records(tier).into_iter().collect()),
        index: [Tier::Assured, Tier::New].map(|tier| edge.entries(tier).into_iter().collect()),
    }
}

/// Removes the times, because the clocks differ.
fn timeless(mut flows: Flows) -> Flows {
    for flow in flows.records.iter_mut().flat_map(|records| records.values_mut()) {
        flow.last_seen = Nanos(0);
        if flow.state & ASSURED != 0 && flow.syn != 0 {
            flow.syn = 1;
        }
    }
    flows
}

/// Returns the random number by which the host draws the port that the kernel has drawn, if the kernel has drawn one.
fn drawn(before: &Flows, after: &Flows) -> Option<u32> {
    let none = Flow::default();
    after
        .records
        .iter()
        .flatten()
        .find_map(|(key, flow)| {
            let old = before.records.iter().find_map(|records| records.get(key));
            if flow.snat_port != old.unwrap_or(&none).snat_port {
                return Some(flow.snat_port);
            }
            (old.is_none() && key.source_port != flow.client_port).then_some(key.source_port)
        })
        .map(random_for)
}

/// Returns the smallest random number that leads to a port.
fn random_for(port: Be16) -> u32 {
    let count = u64::from(SNAT_PORTS.end - SNAT_PORTS.start);
    let offset = u64::from(port.get().saturating_sub(SNAT_PORTS.start));
    u32::try_from((offset << 32).div_ceil(count)).unwrap_or(u32::MAX)
}

/// Returns pseudo-random bytes (xorshift64*), the same for the same seed.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()[0]
    })
    .take(DECISIONS)
    .collect()
}

#[test]
fn every_port_can_be_drawn() {
    for port in SNAT_PORTS {
        let count = u64::from(SNAT_PORTS.end - SNAT_PORTS.start);
        let offset = (u64::from(random_for(Be16::new(port))) * count) >> 32;
        assert_eq!(offset, u64::from(port - SNAT_PORTS.start));
    }
    assert_ne!(Net::ALL[0].here(), Net::ALL[1].here());
}
