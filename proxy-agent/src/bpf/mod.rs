//! The kernel: loading programs, attaching them, and the maps between them and the agent.
//!
//! [`dataplane`] is what the agent holds. [`tc`] attaches programs to network devices. [`maps`] is all that the
//! inspection commands need. [`pins`] is the layout of the pin directory. [`sys`] holds system calls that aya has no
//! safe way for.

pub mod sys;

mod bpf_fs;

pub mod pins;

pub(crate) mod notes;

pub mod maps;

pub mod writable;

pub mod flow_maps;

mod load;

pub(crate) use load::{Refused, chain};

pub mod dataplane;

pub(crate) mod device;

pub(crate) mod self_test;

pub(crate) mod clsact;

pub mod tc;

pub(crate) mod others;

#[cfg(feature = "debug-log")]
mod debug_log;

#[cfg(test)]
mod tests;
