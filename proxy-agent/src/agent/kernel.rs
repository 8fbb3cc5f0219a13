//! Kernel objects that the agent holds once the maps are open, and its model of the maps.

use std::path::Path;
use std::sync::Arc;

use super::error::AgentError;
use super::grace::Grace;
use crate::bpf::dataplane::{Dataplane, DataplaneError, Sizes};
use crate::bpf::pins::PinDir;
use crate::bpf::self_test;
use crate::bpf::self_test::SelfTestError;
use crate::bpf::sys;
use crate::host::sockets::{Places, SocketMaps, SocketSweeper, SocketsError};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::model::{Model, Port};
use crate::reconcile::plan::LostClaims;
use crate::reconcile::store::{MapStore as _, Op, StoreError};

/// Kernel objects that have been set up, and the model of the maps.
pub(super) struct Kernel {
    pub(super) dataplane: Dataplane,
    pub(super) model: Model,
    /// Numbers of `model` that come back after a grace period.
    pub(super) grace: Grace,
    /// Sweeps over sockets, or the reason why there are none.
    pub(super) sweeper: Result<(Arc<SocketSweeper>, Arc<SocketMaps>), SocketsError>,
    /// Whether the programs are attached. Before that, nobody reads new contents of these maps.
    pub(super) attached: bool,
}

impl Kernel {
    /// Makes or takes over maps that are large enough, and loads the programs; `loading` is called with the name of
    /// each. Attaches nothing: programs that this agent or an earlier one has attached go on with the maps as they
    /// were.
    pub(super) async fn open(
        pins: PinDir,
        sizes: Sizes,
        loading: impl Fn(&str) + Send + 'static,
    ) -> Result<Self, AgentError> {
        let opening = tokio::task::spawn_blocking(move || Dataplane::open(pins, sizes, loading));
        let dataplane = opening.await.map_err(DataplaneError::Panic)??;
        let sweeper = match SocketSweeper::new(Places::default()) {
            Ok(sweeper) => Ok((Arc::new(sweeper), Arc::new(dataplane.sockets()?))),
            Err(error) => Err(error),
        };
        let model = Model::new(dataplane.maps.capacity());
        Ok(Self { dataplane, model, grace: Grace::default(), sweeper, attached: false })
    }

    /// Replaces the model by what the maps hold. Numbers that the lost model had freed are found free again; a grace
    /// period makes them so.
    pub(super) fn read_back(&mut self) -> Result<(), AgentError> {
        let maps = &self.dataplane.maps;
        let contents = maps.contents()?;
        maps.refresh_filter(&contents).map_err(SelfTestError::from)?;
        self.model = Model::restore(maps.capacity(), &contents);
        self.grace = Grace::default();
        if let Err(error) = sys::grace_period() {
            tracing::warn!(%error, "waiting for running programs");
        }
        Ok(())
    }

    /// Carries out operations, from first to last.
    pub(super) fn carry_out(&mut self, ops: &[Op]) -> Result<(), SelfTestError> {
        let mut ops = ops.iter();
        ops.try_for_each(|op| self.dataplane.maps.apply(op)).map_err(|error: StoreError| error.into())
    }

    /// Attaches the programs, and sees whether they serve.
    pub(super) fn attach(&mut self, cgroup: &Path) -> Result<(), AgentError> {
        self.dataplane.attach(cgroup)?;
        self_test::run(&mut self.dataplane.maps)?;
        self_test::settle(&self.dataplane.maps)?;
        self.attached = true;
        Ok(())
    }

    /// Returns the cost of removing all that a Service has.
    pub(super) fn weight(&self, service: &ObjectKey) -> usize {
        self.model.of_service(service).map(|(_, port)| cost(port)).sum()
    }

    /// Returns the claims of a Service that others have.
    pub(super) fn lost(&self, service: &ObjectKey) -> LostClaims {
        let mut lost = LostClaims::default();
        lost.look(&self.model, service, self.model.ports_of(service).map(AsRef::as_ref));
        lost
    }
}

/// Returns the cost of replacing or removing a port.
pub(super) fn cost(port: &Port) -> usize {
    1 + port.claims.len() + port.backends.len()
}
