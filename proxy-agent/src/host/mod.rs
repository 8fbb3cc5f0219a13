//! This host, as reported by its kernel and `/proc`: addresses, cgroups and network namespaces of pods, sockets, and
//! this process.

pub mod addresses;

pub mod cgroups;

pub mod clock;

pub mod facts;

pub mod follow;

pub mod named_file;

pub mod netlink;

pub mod process;

pub mod sockets;

pub mod sys;

#[cfg(test)]
pub(crate) mod testing;

pub use addresses::{HostAddresses, watch_addresses};
pub use facts::{Host, HostError};
pub use follow::FollowError;
