//! Vipr's agent: keeps the BPF maps what the Kubernetes API (or a directory of manifests) says they should be.
//!
//! Data flows one way; everything between the first and the last arrow is pure:
//!
//! ```text
//! sources -> Cluster -> desired() -> DesiredService -> plan() -> Plan -> MapStore -> BPF maps
//!                                       pinned maps -> Model ----^
//! ```

pub mod cluster;

pub mod sources;

pub mod desired;

pub mod ids;

pub mod store;

pub mod model;

pub mod plan;

pub mod sim;

pub mod stale;

mod named_file;

mod netlink;

pub mod bpf;

pub mod selftest;

pub mod sockets;

pub mod flows;

pub mod node;

pub mod edge;

pub mod opt_out;

pub mod http;

pub mod health;

pub mod metrics;

pub mod shares;

pub mod events;

pub mod report;

pub mod kube_proxy;

pub mod called_as;

pub mod args;

pub mod config;

pub mod process;

pub mod telemetry;

pub mod knowledge;

pub mod drift;

pub mod verify;

pub mod agent;

pub mod inspect;

pub mod table;

pub mod explain;

pub mod monitor;

pub mod cleanup;

pub mod cli;

/// Name of an IP protocol number as Kubernetes writes it.
pub const fn proto_name(proto: u8) -> &'static str {
    match proto {
        proxy_common::abi::proto::TCP => "TCP",
        proxy_common::abi::proto::UDP => "UDP",
        proxy_common::abi::proto::SCTP => "SCTP",
        _ => "?",
    }
}
