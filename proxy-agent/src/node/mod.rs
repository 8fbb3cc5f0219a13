//! This host: which addresses it has, and which of them serve nodePorts.
//!
//! [`addresses`] asks the kernel, by way of [`follow`], which keeps what a dump says current; [`node_ports`] is the
//! pure decision. Together they say what `LOCAL_ADDRESSES` holds.

pub mod addresses;
pub mod follow;
pub mod node_ports;
#[cfg(test)]
pub(crate) mod testing;

pub use addresses::watch_addresses;
pub use follow::FollowError;
pub use node_ports::{NodePortAddresses, NodePortAddressesError, local_addresses};
