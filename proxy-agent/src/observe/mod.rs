//! Output for people, probes, scrapers and load balancers.

pub mod events;

pub mod health;

pub mod http;

pub mod metrics;

pub mod probe;

pub mod reasons;

pub mod report;
