//! SCTP from end to end, over the kernel's own sockets.

use anyhow::{Context as _, Result};
use proxy_tests::lab::Proto;

use super::checks::{Answer, served};
use super::kernel::lacks;
use super::objects::{Backend, HERE, THERE, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::world::{ELSEWHERE, N1, ON_THIS_NODE, P, World, X};

pub(super) const ROWS: &[Row] = &[Row { id: "k040_sctp", check: sctp }];

fn sctp(world: &World) -> Result<Outcome> {
    for Backend { name, .. } in [HERE, THERE] {
        if let Err(error) = world.pod(name).serve().sctp(8080).start() {
            return lacks("SCTP", error);
        }
    }
    let (pod, outside) = (world.pod("P"), world.lab().client("X"));
    for v6 in [false, true] {
        for (service, backend, from_outside) in [(ON_THIS_NODE, HERE, X), (ELSEWHERE, THERE, N1)] {
            served(&pod, Proto::Sctp, &cluster_ip(service.number, v6, 80), Answer::from(backend, &P))
                .context("of a pod")?;
            served(
                &outside,
                Proto::Sctp,
                &node_port(service.number, v6, 80),
                Answer::from(backend, &from_outside),
            )
            .context("from outside")?;
        }
    }
    right("of a pod and from outside, to a pod here and elsewhere")
}
