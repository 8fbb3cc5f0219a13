//! Each test is an attack, or a burden that somebody puts on the node, with victims that must not notice it.

mod forged;
mod strangers;
mod tables;
mod world;
