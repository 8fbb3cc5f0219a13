//! The behaviour cases with the agent itself, its BPF programs and real sockets in the lab.
//!
//! Every case gets a lab of its own. The objects of a step are one manifest file that replaces the previous one, and
//! the checks begin when the agent has programmed it. Endpoints are real servers. Every other owner of an address
//! that a client asks for serves there, too: see the module `live::world`.
//!
//! The host and pods of the node under test meet the socket edge, which leaves to the packet edge the results that it
//! cannot tell a pod. The pod Q of another node and clients outside meet the packet edge at the node's devices. Every
//! check of a pod runs a second time, in a test whose name ends in `_packets`: there the pods are in no cgroup of the
//! node, so that their packets meet the packet edge. UDP is tried with connected and with unconnected sockets.
//!
//! - Endpoints: the endpoint that answers tells its name and its own address. The client must see the address that it
//!   asked for in getpeername and as the source of datagrams.
//! - `keep` and `masq`: the server sees the source address that [`cases::masquerade::seen`] returns.
//! - REJECT: ECONNREFUSED. At a socket, the call that names the destination returns it. A server listens at the
//!   destination, so the kernel itself does not refuse.
//! - DROP: silence; at a socket of the host EHOSTUNREACH (EPERM before 5.18).
//! - PASS: the real owner of the destination answers.
//!
//! Pauses and affinity timeouts are a fifth of the table's.

use anyhow::{Context as _, Result};
use proxy_tests::cases::{self, Case, DetectLocal, Pods, falsified};
use proxy_tests::lab::LabSpec;
use proxy_tests::lab::network::PodLinks;

use crate::live;

/// Cases without a test here, each with the reason.
const LEFT_OUT: [(&str, &str); 1] = [("P178", "SCTP")];

/// Defines one test per name, and the list of the names.
macro_rules! tests {
    ($list:ident $pods:ident: $($name:ident)*) => {
        const $list: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() -> Result<()> {
                run(stringify!($name), Pods::$pods)
            }
        )*
    };
}

fn run(name: &str, pods: Pods) -> Result<()> {
    let name = name.trim_end_matches("_packets");
    let case = cases::all().into_iter().find(|case| case.test_name() == name);
    run_case(case.context("no case of the table has this name")?, pods)
}

fn run_case(case: Case, pods: Pods) -> Result<()> {
    let mut spec = LabSpec::cases()?;
    if let DetectLocal::Bridge(_) = case.config.detect_local {
        spec.network.pods = PodLinks::Bridged;
    }
    live::check(case, spec, pods, |_| Ok(()))
}

#[test]
fn every_case_has_its_tests() {
    assert_eq!(SEEN, cases::lab_tests(Pods::Seen));
    assert_eq!(UNSEEN, cases::lab_tests(Pods::Unseen));
    // A mistake about what can be checked would make tests vanish.
    assert_eq!([SEEN.len(), UNSEEN.len()], [149, 143]);
}

#[test]
fn cases_without_a_check_that_can_run_are_left_out() {
    let all = cases::all();
    let idle = all.iter().filter(|case| !case.is_live(Pods::Seen) && !case.is_live(Pods::Unseen));
    assert_eq!(idle.map(|case| case.id).collect::<Vec<_>>(), LEFT_OUT.map(|(id, _)| id));
}

/// Checks that each wrong check of a case is noticed, one at a time.
fn is_noticed(id: &str, pods: Pods) -> Result<()> {
    let all = cases::all();
    let case = all.iter().find(|case| case.id == id).context("no such case")?;
    for (wrong, check) in falsified(case).into_iter().filter(|(_, check)| check.is_live(pods)) {
        let check = format!("{check:?}");
        let message = run_case(wrong, pods).err().map(|error| format!("{error:#}"));
        assert!(message.as_ref().is_some_and(|text| text.contains(&check)), "{check}: {message:?}");
    }
    Ok(())
}

/// One check of each kind, by pods whose sockets are seen, by other pods, and from outside.
mod a_wrong_expectation_is_noticed {
    use super::*;

    macro_rules! in_case {
        ($($name:ident: $id:literal $pods:ident,)*) => {$(
            #[test]
            fn $name() -> Result<()> {
                is_noticed($id, Pods::$pods)
            }
        )*};
    }
    in_case! {
        p001: "P001" Seen,
        p043: "P043" Seen,
        p141: "P141" Seen,
        p143: "P143" Seen,
        p169: "P169" Seen,
        p080: "P080" Seen,
        p143_packets: "P143" Unseen,
        p170: "P170" Seen,
    }
}

// Written by `build.rs` from the table.
include!(concat!(env!("OUT_DIR"), "/lab_cases.rs"));
