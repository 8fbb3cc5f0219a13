//! Tenants who do not trust each other: whatever one of them sends, the others' connections go on.
//!
//! Each test is an attack, or a burden that somebody puts on the node, with victims that must not notice it.

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
