//! Vipr's agent: keeps the BPF maps what the Kubernetes API (or a directory of manifests) says they should be.
//!
//! Data flows one way; everything between the first and the last arrow is pure:
//!
//! ```text
//! sources -> Cluster -> desired() -> DesiredService -> plan() -> Plan -> MapStore -> BPF maps
//!                                       pinned maps -> Model ----^
//! ```
//!
//! A room imports only rooms that stand above it in this list (`cargo xtask lint` looks):

pub mod reconcile;

pub mod host;

pub mod bpf;

pub mod config;

pub mod devices;

pub mod sources;

pub mod observe;

pub mod agent;

pub mod commands;
