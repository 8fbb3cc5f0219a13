//! Kernel objects that the agent holds once the maps are open.

use std::sync::Arc;

use super::grace::Grace;
use crate::bpf::dataplane::Dataplane;
use crate::host::sockets::{SocketMaps, SocketSweeper};
use crate::reconcile::model::Model;

/// Kernel objects that have been set up, and the model of the maps.
pub(super) struct Programmed {
    pub(super) dataplane: Dataplane,
    pub(super) model: Model,
    /// Numbers of `model` that come back after a grace period.
    pub(super) grace: Grace,
    pub(super) sweeper: Option<(Arc<SocketSweeper>, Arc<SocketMaps>)>,
    /// Whether the programs are attached. Before that, nobody reads new contents of these maps.
    pub(super) attached: bool,
}
