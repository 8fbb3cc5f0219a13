//! Every decision of the proxy, as ordinary Rust: no I/O, no `unsafe`, no kernel.
//!
//! In reading order: [`tables`] is the data that decisions may read and write, [`lookup`] finds the owner of
//! an address, [`select`] picks a backend, [`socket`] is the socket edge built from both, [`edge`] is the packet
//! edge, [`trace`] reports decisions.
//!
//! Code here ends up in BPF programs: no panics (indexing, `unwrap`, overflow, division), no unbounded loops. Small
//! functions are `#[inline(always)]`; `#[inline(never)]` keeps the stack of a stage to itself.

pub mod tables;

pub mod lookup;

pub mod select;

pub mod socket;

pub mod trace;

pub mod edge;

#[cfg(test)]
mod tests;
