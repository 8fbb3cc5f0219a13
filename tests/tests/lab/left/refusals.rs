//! Silence and source ranges, with and without programs on the interfaces of pods.

use super::*;

const NONE: &[(&str, &str)] = &[("pod-interfaces", "none")];

/// Checks the answers that each client gets where no program is attached to the interfaces of pods.
fn at_sockets(setting: &Setting) -> Result<()> {
    let (p, l2) = (setting.lab.pod("P"), setting.lab.pod("L2"));
    for place in [&*p, &*l2, setting.host()] {
        for target in [GUARDED, ABSENT, INACTIVE] {
            denied(place, target)?;
        }
        answered(place, OPEN, "L1")?;
    }
    assert_eq!(setting.status()?["podsInPackets"], false);
    let problem = setting.problem("Service a/guarded")?.to_string();
    ensure!(problem.contains("sockets of pods are refused") && problem.contains("198.18.5.5"), "{problem}");
    Ok(())
}

/// Checks the answers that each client gets where the packet edge is attached to the interfaces of pods.
fn in_packets(setting: &Setting) -> Result<()> {
    let (p, l2) = (setting.lab.pod("P"), setting.lab.pod("L2"));
    setting.served(&p, GUARDED, true)?;
    unheard(&l2, GUARDED)?;
    denied(setting.host(), GUARDED)?;
    for target in [ABSENT, INACTIVE] {
        unheard(&p, target)?;
        unheard(&l2, target)?;
        denied(setting.host(), target)?;
    }
    for place in [&*p, &*l2, setting.host()] {
        setting.served(place, OPEN, false)?;
    }
    assert_eq!(setting.status()?["podsInPackets"], true);
    assert_eq!(setting.problem("Service a/guarded")?, Value::Null);
    Ok(())
}

#[test]
fn p075_p143_p152_p156_pods_are_told_by_packets_once_their_interfaces_are_attached() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, NONE)?;
    at_sockets(&setting).context("pod interfaces off")?;
    setting.start(&[])?;
    in_packets(&setting).context("pod interfaces on")?;
    for name in ["left_to_packets", "drop_source_range", "drop_no_local_endpoint", "drop_inactive_address"] {
        ensure!(setting.counter(name)? > 0, "{name}");
    }

    // Neither the end of the agent nor its start makes a difference.
    let mut clients = setting.lab.pod("P").connect(GUARDED).start()?;
    setting.agent.kill9()?;
    clients.wait_for(20)?;
    in_packets(&setting).context("no agent")?;
    setting.start(&[])?;
    clients.wait_for(20)?;
    let attempts = clients.stop()?;
    let failed = attempts.iter().find(|attempt| attempt.server.as_deref() != Some("L1"));
    ensure!(failed.is_none(), "{failed:?} of {}", attempts.len());

    setting.start(NONE)?;
    at_sockets(&setting).context("off again")
}

#[test]
fn the_last_interface_of_a_pod_takes_the_packet_edge_along() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, NONE)?;
    let (attached, other) = (setting.lab.pod("L2"), &setting.lab.pod("P"));
    setting.start(&[("pod-interfaces", attached.host_device())])?;
    unheard(&attached, INACTIVE)?;

    // Packets of a pod whose interface is not attached are dropped as well, if no host outside can be meant.
    let before = (setting.counter("drop_inactive_address")?, setting.counter("drop_no_flow")?);
    unheard(other, INACTIVE)?;
    unheard(other, ABSENT)?;
    let after = (setting.counter("drop_inactive_address")?, setting.counter("drop_no_flow")?);
    ensure!(after.0 >= before.0 + 3 && after.1 >= before.1 + 3, "{before:?}, {after:?}");
    answered(other, GUARDED, ELSEWHERE)?;

    setting.lab.remove_pod("L2")?;
    setting.wait_problem("Service a/guarded", |problem| !problem.is_null())?;
    denied(other, INACTIVE)
}

/// NodeLocal DNSCache listens at the clusterIP of a Service that is left to it
/// (`service.kubernetes.io/service-proxy-name`), as an address of the host.
#[test]
fn an_address_that_the_host_has_is_reached() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, NONE)?;
    for flags in [NONE, &[]] {
        setting.start(flags)?;
        let (pod, host) = (setting.lab.pod("P"), setting.host());
        ensure!(reached(&pod).is_none() && reached(host).is_none());
        host.net().ip("address add 10.96.77.77/32 dev lo")?;
        if flags == NONE {
            // The server keeps running.
            host.serve().at("tcp", INACTIVE).at("udp", INACTIVE).start()?;
        }
        until("the pod", || Ok(reached(&pod)))?;
        until("the host", || Ok(reached(host)))?;
        host.net().ip("address delete 10.96.77.77/32 dev lo")?;
        until("silence", || Ok(reached(&pod).is_none().then_some(())))?;
    }
    Ok(())
}

fn reached(place: &Place) -> Option<Vec<(Proto, Attempt)>> {
    answered(place, INACTIVE, "n1").ok()
}

/// A pod has used a port towards a VIP, by packets, and then uses the port towards the backend itself, as its sockets
/// do for another VIP. The kernel may give the pod that port at once, because both sides have closed the first
/// connection.
#[test]
fn a_port_serves_in_packets_and_at_sockets_by_turns() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, NONE)?;
    setting.start(&[])?;
    let pod = setting.lab.pod("P");
    for number in 0..50 {
        let from = format!("10.64.1.50:{}", 45_000 + number);
        for target in [GUARDED, OPEN, GUARDED] {
            let attempt = pod.connect(target).bind(&from).to_the_end().one()?;
            ensure!(attempt.server.as_deref() == Some("L1"), "{target} from {from}: {attempt:?}");
        }
    }
    let again = syns_sent_again(&pod)?;
    // A busy machine alone may cause so many.
    ensure!(again <= 3, "{again} SYNs were sent again");
    Ok(())
}
