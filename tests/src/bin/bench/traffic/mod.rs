//! Traffic between pairs of client and server processes, and rounds of it by turns: shared by the benchmarks of
//! connections.

mod client;
mod pair;
mod rounds;
mod server;
mod wire;

pub(crate) use client::{ClientArgs, client};
pub(crate) use pair::{Pair, Spot};
pub(crate) use rounds::{Rounds, share};
pub(crate) use server::{ServerArgs, server};
pub(crate) use wire::{Answer, Call, Job, Listener, Workload};
