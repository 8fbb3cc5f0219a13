//! A part of the change of one Service.

use std::sync::Arc;

use crate::reconcile::desired::{DesiredPort, PortKey};

/// Maximal number of reasons reported for one Service.
pub(crate) const REASONS: usize = 16;

/// Some ports of a Service, to be changed while the other ports stay as they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    /// `metadata.creationTimestamp`.
    pub(crate) created: i64,
    /// Wanted ports.
    pub(crate) ports: &'a [DesiredPort],
    /// Ports that are no longer wanted.
    pub(crate) gone: &'a [Arc<PortKey>],
}
