//! The watch of the Kubernetes API: how lists come, and how often a server is asked that does not answer.

mod lists;
mod pace;
