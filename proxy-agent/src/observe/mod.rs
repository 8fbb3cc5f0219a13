//! Output for people, probes, scrapers and load balancers.

pub(crate) mod events;

pub(crate) mod health;

pub(crate) mod http;

pub(crate) mod metrics;

pub(crate) mod probe;

pub(crate) mod reasons;

pub(crate) mod report;
