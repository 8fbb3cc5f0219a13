//! Programs and filters of others on devices, and IPsec.

use super::*;

/// Runs tc(8); the bytecode at the end of a line is one word.
fn tc(line: &str) {
    let mut tc = std::process::Command::new("tc");
    match line.split_once(" bytecode ") {
        Some((rest, bytecode)) => tc.args(rest.split(' ')).args(["bytecode", bytecode]),
        None => tc.args(line.split(' ')),
    };
    assert!(tc.status().unwrap().success(), "tc {line}");
}

#[test]
fn filters_of_others_are_told_while_they_see_services() {
    const EVERYTHING: &str = "protocol ip u32 match u32 0 0 flowid 1:1";
    Node::run(async |node| {
        let mut task = node.start().await;
        // Filters on ingress are where they should be. A queueing discipline other than clsact has no egress filters,
        // and the kernel lists its ingress filters again instead. Only a filter leads to chains other than the first.
        tc("qdisc add dev cali1 ingress");
        tc(&format!("filter add dev cali1 ingress pref 1 {EVERYTHING}"));
        tc("qdisc add dev eth0 clsact");
        tc(&format!("filter add dev eth0 ingress pref 1 {EVERYTHING}"));
        tc(&format!("filter add dev eth0 egress pref 1 chain 5 {EVERYTHING}"));
        add_pod(2);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 3).await;
        assert_eq!((others(&state), &state.problems), (Vec::new(), &BTreeMap::new()));

        tc(&format!("filter add dev eth0 egress pref 10 {EVERYTHING}"));
        tc(&format!("filter add dev eth0 egress pref 20 {EVERYTHING}"));
        add_pod(3);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 4).await;
        let told = ["u32 filter, pref 10 behind on egress", "u32 filter, pref 20 behind on egress"];
        assert_eq!(others(&state), told.map(|other| ("eth0", other.to_owned())));
        let problems = BTreeMap::from([("device eth0".to_owned(), vec![BEHIND_ON_EGRESS.to_owned()])]);
        assert_eq!(state.problems, problems);

        tc("filter del dev eth0 egress pref 10");
        tc("filter del dev eth0 egress pref 20");
        add_pod(4);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 5).await;
        assert_eq!((others(&state), &state.problems), (Vec::new(), &BTreeMap::new()));
    });
}

/// Our programs are clsact filters here, and filters of others are on either side of them.
#[test]
fn filters_of_others_beside_filters_of_ours() {
    Node::run(async |mut node| {
        node.config.no_tcx = true;
        tc("qdisc add dev eth0 clsact");
        // Of the filters with one priority, the kernel asks the newest first.
        add_continuing("egress pref 65535");
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(others(&state), [("eth0", "bpf filter, pref 65535 behind on egress".to_owned())]);
        assert_eq!(state.problems["device eth0"], [BEHIND_ON_EGRESS]);

        // This removes our filter as well.
        tc("filter del dev eth0 egress pref 65535");
        add_continuing("egress pref 10");
        add_continuing("ingress pref 1");
        add_continuing("ingress pref 2");
        add_pod(2);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 3).await;
        let told = ["bpf filter, pref 10 ahead on egress", "bpf filter, pref 1 ahead on ingress"];
        assert_eq!(others(&state), told.map(|other| ("eth0", other.to_owned())));
        assert_eq!(state.problems["device eth0"], [AHEAD_ON_INGRESS]);
    });
}

/// Adds a filter that lets other filters decide.
fn add_continuing(place: &str) {
    tc(&format!("filter add dev eth0 {place} protocol all bpf da bytecode 1,6 0 0 4294967295"));
}

#[test]
fn ipsec_policies_are_a_problem_while_they_are_there() {
    Node::run(async |node| {
        if !std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap().contains(" 6   ") {
            eprintln!("this kernel has no xfrm");
            return;
        }
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(state.problems, BTreeMap::new());
        ip("xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir out\n");
        add_pod(2);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 3).await;
        assert_eq!(state.problems.keys().collect::<Vec<_>>(), ["IPsec"]);
        ip("xfrm policy flush\n");
        add_pod(3);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 4).await;
        assert_eq!(state.problems, BTreeMap::new());
    });
}
