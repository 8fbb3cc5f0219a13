//! What people, probes, scrapers and load balancers are told.

pub mod events;

pub mod health;

pub mod http;

pub mod metrics;

pub mod reasons;

pub mod report;
