//! Code that the kernel side and the agent share: the map ABI and the pure datapath.
//!
//! Layers, each knowing only the ones before it:
//!
//! 1. [`addr`] and [`be`]: addresses and ports in network byte order. IPv4 is `::ffff:a.b.c.d` from here on.
//! 2. [`abi`]: the plain-old-data types that live in BPF maps. Their docs name the maps.
//! 3. [`datapath`]: every decision of the proxy, generic over small traits, compiled into the BPF programs and
//!    into host tests alike.
//!
//! The crate is `no_std`, does no I/O, and contains no `unsafe`: the only exception is the marker
//! implementations in `abi/pod.rs` (feature `user`).

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!(
    "Vipr runs on little-endian machines only: the BPF object and the layout of its maps are little-endian"
);

pub mod be;

pub mod addr;

pub mod abi;

pub mod datapath;
