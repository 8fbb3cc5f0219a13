//! The wanted contents of the maps, and the operations that lead there: pure, from values to values.
//!
//! [`cluster`] holds the state that the sources have delivered. [`desired`] derives from it what one Service needs.
//! [`plan`] compares that with the [`model`] of the maps. [`store`] defines the operations. [`sim`] holds the maps
//! without a kernel, with the datapath's own code on top.

pub mod cluster;

pub mod desired;

pub(crate) mod drift;

pub(crate) mod ids;

pub mod model;

pub(crate) mod node_ips;

pub mod plan;

pub(crate) mod shares;

pub mod sim;

pub(crate) mod stale;

pub mod store;
