//! What the socket edge leaves to the packet edge: refusals that a pod's socket cannot be told, and pods that opt out.

mod left;
