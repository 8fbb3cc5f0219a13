//! `proxy-agent verify`: compares the kernel maps with what follows from the source, from scratch.
//!
//! The command asks no running agent and writes nothing. It takes as found what it cannot tell by itself: which
//! interfaces are attached, and which pods have opted out of the socket edge.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use proxy_common::abi::node::PODS_IN_PACKETS;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::agent::knowledge::Knowledge;
use crate::agent::{AgentError, connect, run_source};
use crate::bpf::maps::KernelMaps;
use crate::bpf::pins::OpenError;
use crate::commands::inspect::{InspectError, print_data};
use crate::commands::table::{line, table};
use crate::config::Config;
use crate::config::args::Output;
use crate::config::devices::DetectLocal;
use crate::host::{HostAddresses, watch_addresses};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::drift::{Difference, differences};
use crate::reconcile::model::Model;
use crate::reconcile::plan::{Wanted, plan};
use crate::sources::Update;

/// Time that the source may take to deliver its first full list.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time after which a difference is not just a change on its way.
const SETTLE: Duration = Duration::from_secs(1);

/// Reason why nothing can be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// The source, the host's addresses or the Node cannot be read.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The maps cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The maps cannot be read.
    #[error("reading the pinned maps: {0}")]
    Read(#[from] aya::maps::MapError),
    /// The source sends no full list.
    #[error("no full list from {0} within {PATIENCE:?}; can it be reached, and may we list (RBAC)?")]
    Silent(String),
}

/// Result of a comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    /// Services that the source has.
    pub(crate) services: usize,
    /// Differences between the maps and what they should hold.
    pub(crate) differences: Vec<Difference>,
    /// Services that do not fit into the maps, with the reason.
    pub(crate) refused: BTreeMap<String, Vec<String>>,
}

/// Compares the maps with what follows from the source.
///
/// # Errors
///
/// [`VerifyError`].
pub(crate) async fn run(config: &Config) -> Result<Findings, VerifyError> {
    let maps = KernelMaps::open(&config.pins)?;
    let addresses = watch_addresses().await.map_err(AgentError::from)?;
    let server = connect(config).map_err(AgentError::from)?;
    let (sender, mut updates) = mpsc::channel(64);
    let source = tokio::spawn(run_source(config.clone(), server, sender));
    let mut known = Knowledge::new(config);
    let listed = timeout(PATIENCE, async {
        while let Some(update) = updates.recv().await {
            if take_in(&mut known, update) {
                return true;
            }
        }
        false
    });
    match listed.await {
        Ok(true) => {}
        // The source has ended before that, for a reason.
        Ok(false) => {
            let ended = source.await.map_err(|_panic| AgentError::SourceEnded)?;
            return Err(ended.map_err(AgentError::from).err().unwrap_or(AgentError::SourceEnded).into());
        }
        Err(_elapsed) => return Err(VerifyError::Silent(config.source.to_string())),
    }
    take_host(&mut known, config, &addresses)?;
    let first = compare(&mut known, config, &maps)?;
    if first.differences.is_empty() {
        return Ok(first);
    }
    tokio::time::sleep(SETTLE).await;
    while let Ok(update) = updates.try_recv() {
        take_in(&mut known, update);
    }
    take_host(&mut known, config, &addresses)?;
    let mut second = compare(&mut known, config, &maps)?;
    second.differences.retain(|difference| first.differences.contains(difference));
    Ok(second)
}

/// Takes in the Node and the addresses of this host as they are now.
fn take_host(
    known: &mut Knowledge,
    config: &Config,
    addresses: &watch::Receiver<HostAddresses>,
) -> Result<(), AgentError> {
    known.take_node(config);
    known.take_addresses(&addresses.borrow());
    let by_pod_cidrs = config.devices.settings.detect_local == DetectLocal::NodeCidr;
    if by_pod_cidrs && !known.take_pod_cidrs(&config.families) {
        return Err(AgentError::NoPodCidrs);
    }
    Ok(())
}

/// Takes in an update. Returns true when the first full list is there.
fn take_in(known: &mut Knowledge, update: Update) -> bool {
    match update {
        Update::Changes(changes) => {
            for change in changes {
                known.cluster.apply(change);
            }
            false
        }
        Update::Synced => true,
        Update::Problems(_) => false,
    }
}

/// Compares the maps with what a full plan makes of their own contents.
fn compare(known: &mut Knowledge, config: &Config, maps: &KernelMaps) -> Result<Findings, VerifyError> {
    known.context.pods_in_packets = maps.node_flags() & PODS_IN_PACKETS != 0;
    let contents = maps.contents()?;
    let mut model = Model::restore(maps.capacity(), &contents);
    let mut wanted: BTreeMap<ObjectKey, Option<Wanted>> =
        known.cluster.services().map(|service| (service.key.clone(), known.wanted(&service.key))).collect();
    for port in model.ports.keys() {
        wanted.entry(port.service.clone()).or_insert(None);
    }
    // The agent reports what there is no room for.
    let _ = known.plan_node(&config.nodeport_addresses, &mut model);
    let plan = plan(&mut model, &wanted, true);
    Ok(Findings {
        services: known.cluster.services().count(),
        differences: differences(&model, &contents, &maps.filter()),
        refused: plan.refused.into_iter().map(|(service, reasons)| (service.to_string(), reasons)).collect(),
    })
}

impl Findings {
    /// Prints the findings.
    ///
    /// # Errors
    ///
    /// [`InspectError`].
    pub(crate) fn print(&self, output: Output, out: &mut impl Write) -> Result<(), InspectError> {
        if print_data(output, self, out)? {
            return Ok(());
        }
        for (service, reasons) in &self.refused {
            line(out, format_args!("Service {service} is not served: {}", reasons.join("; ")))?;
        }
        if self.differences.is_empty() {
            writeln!(out, "the maps hold what they should for {} Services", self.services)?;
            return Ok(());
        }
        let rows = self.differences.iter().map(|difference| {
            [difference.map.to_owned(), difference.object.clone(), difference.what.clone()]
        });
        Ok(table(["MAP", "OBJECT", "DIFFERENCE"], rows, out)?)
    }
}
