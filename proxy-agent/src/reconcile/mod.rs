//! What the maps should hold, and the operations that lead there: pure, from values to values.
//!
//! [`cluster`] is what sources have told, [`desired`] what one Service becomes, [`plan`] compares that with the [`model`] of
//! the maps; [`store`] is what carries operations out, and [`sim`] maps without a kernel, with the datapath's own code on top.

pub mod cluster;

pub mod desired;

pub mod drift;

pub mod ids;

pub mod model;

pub mod node_ips;

pub mod plan;

pub mod shares;

pub mod sim;

pub mod stale;

pub mod store;
