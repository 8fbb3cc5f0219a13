//! This host: which addresses it has, and which of them serve nodePorts.
//!
//! [`addresses`] asks the kernel and follows changes; [`node_ports`] is the pure decision. Together they say what
//! `LOCAL_ADDRESSES` holds.

pub mod addresses;
pub mod node_ports;
#[cfg(test)]
pub(crate) mod testing;

pub use addresses::{AddressesError, watch_addresses};
pub use node_ports::{NodePortAddresses, NodePortAddressesError, local_addresses};
