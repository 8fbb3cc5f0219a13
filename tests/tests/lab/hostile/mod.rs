//! Tenants that do not trust each other: the packets and objects of one do not harm the connections of the others.
//!
//! Each test is an attack on the node, or a load, with victims that must not notice it.

mod affinity;
mod fire;
mod forged;
mod histories;
mod outside;
mod resolvers;
mod services;
mod strangers;
mod sweeps;
mod tables;
mod tenants;
mod thieves;
mod trains;
mod world;
