//! The suite `pure`: the decisions of the agent and of the datapath, compiled for the host and run on values. It sees
//! no kernel, no socket and no clock, and needs no privileges.

mod cases;
mod catalogue;
#[cfg(test)]
mod packets;
mod simulated;
mod syncs;
