//! Every behaviour case without a kernel.
//!
//! Objects become JSON and pass through the same stages as in the agent: conversion, cluster, desired state, plan,
//! single map operations. Each step is told to the running agent as its difference from the step before. The maps are
//! ordered maps. They are read by the same code that the BPF programs are made of.
//!
//! - Senders on this node (P, P6, L1, many pods, H) are sockets at the socket edge, told apart by their network
//!   namespaces. UDP is tried twice: connected, and by sendmsg(). Every case is run twice: with a packet
//!   edge for the packets that pods' sockets leave alone, and without one. [`Case::on_sockets`] gives the results
//!   that differ in the second run.
//! - Senders elsewhere (Q, X, Y, X6) are packets: the Service port, the set and the verdict are checked.
//! - Source addresses (`keep`, `masq`) are not checked here: nothing has an address before a kernel gives it one.
//! - Time is the simulator's own; pauses cost nothing.

use anyhow::{Context as _, Result};
use proxy_tests::cases::{self, falsified};

use crate::simulated;

/// Defines one test per name, and the list of the names.
macro_rules! tests {
    ($($name:ident)*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() -> Result<()> {
                run(stringify!($name))
            }
        )*
    };
}

fn run(name: &str) -> Result<()> {
    let case = cases::all().into_iter().find(|case| case.test_name() == name);
    let case = case.context("no case of the table has this name")?;
    simulated::check(&case, true).context("with packets of pods")?;
    simulated::check(&case.on_sockets(), false).context("without packets of pods")
}

#[test]
fn every_case_with_anything_to_check_has_its_test() {
    assert_eq!(NAMES, cases::pure_tests());
    // A mistake about what can be checked would make tests vanish.
    assert_eq!(NAMES.len(), 142);
}

#[test]
fn every_wrong_expectation_is_noticed() {
    for case in cases::all() {
        for (case, in_packets) in [(case.clone(), true), (case.on_sockets(), false)] {
            for (wrong, check) in falsified(&case).into_iter().filter(|(_, check)| check.is_pure()) {
                assert!(simulated::check(&wrong, in_packets).is_err(), "{} passes with {check:?}", wrong.id);
            }
        }
    }
}

// Written by `build.rs` from the table.
include!(concat!(env!("OUT_DIR"), "/pure_cases.rs"));
