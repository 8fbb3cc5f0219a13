//! The watch of the Kubernetes API: how lists come, how often a server is asked that does not answer, and how much
//! of a namespace is kept.

mod credentials;
mod lists;
mod pace;
mod tenants;
