//! A part of the change of one Service.

use crate::reconcile::desired::{DesiredPort, PortKey};
use std::sync::Arc;

/// Maximal number of reasons reported for one Service.
pub const REASONS: usize = 16;

/// Some ports of a Service, to be changed while the other ports stay as they are.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// `metadata.creationTimestamp`.
    pub created: i64,
    /// Wanted ports.
    pub ports: &'a [DesiredPort],
    /// Ports that are no longer wanted.
    pub gone: &'a [Arc<PortKey>],
}
