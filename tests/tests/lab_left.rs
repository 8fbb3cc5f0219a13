//! What the socket edge leaves to the packet edge: refusals that a pod's socket cannot be told.

mod left;
