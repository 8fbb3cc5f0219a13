//! Sources of Kubernetes objects: the Kubernetes API ([`api`]) or a directory of manifests ([`manifests`]).
//!
//! Both sources convert Kubernetes objects into [`crate::reconcile::cluster::Change`]s with [`convert`] and send them
//! as [`Update`]s. The rest of the agent does not know which of the two it has. A running source does not end on
//! errors: failed operations are retried, and the last known state stays in force meanwhile.

pub mod convert;
mod error;
pub mod objects;
mod share;
mod text;
mod update;

pub mod api;
pub(crate) mod manifests;

pub use error::SourceError;
pub use update::{Problem, Update};
