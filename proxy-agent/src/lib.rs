//! Vipr's agent: keeps the BPF maps as the Kubernetes API (or a directory of manifests) says.
//!
//! Data flows one way. Every step between the first and the last arrow is pure:
//!
//! ```text
//! sources -> Cluster -> desired() -> DesiredService -> plan() -> Plan -> MapStore -> BPF maps
//!                                       pinned maps -> Model ----^
//! ```
//!
//! A module imports only modules that stand above it in this list (`cargo xtask lint` checks that):

#![warn(unreachable_pub)]

pub mod reconcile;

pub mod host;

pub mod bpf;

pub mod config;

pub mod devices;

pub mod sources;

pub mod observe;

pub mod agent;

pub mod commands;

// For the fuzzers, and the replay of their corpora in the unit tests.
#[cfg(any(test, fuzzing))]
pub mod inputs;
