//! This host: which addresses it has, and which of them serve nodePorts.
//!
//! [`addresses`] asks the kernel, by way of [`follow`], which keeps what a dump says current; [`node_ports`] is the
//! pure decision, with the node's own [`ips`]. Together they say what `LOCAL_ADDRESSES` holds. [`host`] is what the
//! configuration has to know beforehand, and [`patience`] how long a start waits for the Node.

pub mod addresses;
pub mod follow;
pub mod host;
pub mod ips;
pub mod node_ports;
pub mod patience;
#[cfg(test)]
pub(crate) mod testing;

pub use addresses::{HostAddresses, watch_addresses};
pub use follow::FollowError;
pub use host::{Host, HostError};
pub use ips::NodeIps;
pub use node_ports::{NodePortAddresses, local_addresses};
pub use patience::{Patience, Verdict};
