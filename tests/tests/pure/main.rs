//! The suite `pure`: the agent's decisions and the datapath's, compiled for the host, on values. It sees no kernel, no socket
//! and no clock, and needs no privileges.

mod cases;
mod inputs;
#[cfg(test)]
mod packets;
mod simulated;
mod syncs;
