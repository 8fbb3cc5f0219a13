//! Every example does what its comments say: the real agent on the manifests of `examples/`, real servers, and real
//! clients in a pod, on the node and outside. Live changes are changes of the files.
//!
//! The modules group the scenarios by subject.

mod changes;
mod cluster;
mod outside;
mod selectors;
mod services;

use std::process::Command;

use proxy_tests::lab::{Attempt, Place};
use proxy_tests::scenarios::{CLIENT, denial};

const KUBIA: [&str; 3] = ["kubia-7nog1", "kubia-gzwli", "kubia-3inly"];
const LINUXEA: [&str; 3] = ["linuxea-0", "linuxea-1", "linuxea-2"];
/// Enough connections for [`evenly`](proxy_tests::scenarios::evenly).
const MANY: usize = 300;

fn failure(attempt: &Attempt) -> &str {
    attempt.error.as_deref().unwrap_or("answered")
}

/// Returns the error at an address for Services that has none: the host is told, a pod waits.
fn failure_without_service(place: &Place) -> &'static str {
    if place.name() == CLIENT { "ETIMEDOUT" } else { denial() }
}

/// The tour of `cargo xtask demo` judges itself.
#[test]
fn the_demo_has_no_unexpected_result() -> anyhow::Result<()> {
    let demo = Command::new(env!("CARGO_BIN_EXE_demo")).output()?;
    anyhow::ensure!(demo.status.success(), "{}", String::from_utf8_lossy(&demo.stdout));
    Ok(())
}
