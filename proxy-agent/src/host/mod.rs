//! This host, as reported by its kernel and `/proc`: addresses, cgroups and network namespaces of pods, sockets, and
//! this process.

pub(crate) mod addresses;

pub(crate) mod cgroups;

pub mod clock;

pub(crate) mod facts;

pub(crate) mod follow;

pub(crate) mod named_file;

pub(crate) mod netlink;

pub(crate) mod process;

pub(crate) mod sockets;

pub(crate) mod sys;

#[cfg(test)]
pub(crate) mod testing;

pub(crate) use addresses::{HostAddresses, device_name, watch_addresses};
pub use facts::Host;
pub(crate) use follow::FollowError;
