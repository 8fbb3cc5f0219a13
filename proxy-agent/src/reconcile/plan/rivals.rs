//! Services that claim the frontends of another Service.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use proxy_common::abi::FrontendKey;
use proxy_common::abi::frontend::FrontendKind;

use super::part::{Part, REASONS};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::PortKey;
use crate::reconcile::model::{Model, Title};

/// Returns the other Services that claim a frontend which `part` claims or is about to claim, or a frontend that
/// shadows it or is shadowed by it. The holder of such a frontend may change, and with it the problems to report for
/// these Services.
pub(crate) fn rivals(model: &Model, service: &ObjectKey, part: &Part<'_>) -> BTreeSet<ObjectKey> {
    let mut rivals = BTreeSet::new();
    let mut claimed = |frontends: &[(FrontendKey, u16)]| {
        for (frontend, _) in frontends {
            let others = model.beside_node_port(frontend).into_iter().chain(model.in_the_way_of(frontend));
            let claims = [*frontend].into_iter().chain(others).filter_map(|key| model.claims.get(&key));
            for claim in claims.flatten().filter(|claim| claim.port.service != *service) {
                rivals.insert(claim.port.service.clone());
            }
        }
    };
    for port in part.ports {
        let before = model.ports.get(&port.key).map_or(&[][..], |port| &port.claims);
        claimed(&port.frontends);
        if before != port.frontends {
            claimed(before);
        }
    }
    for port in part.gone.iter().filter_map(|key| model.ports.get(key)) {
        claimed(&port.claims);
    }
    rivals
}

/// Frontends that a Service claims and another Service holds, by a better title or because it is older.
#[derive(Debug, Default)]
pub(crate) struct LostClaims {
    sentences: Vec<String>,
    /// Number of frontends beyond [`REASONS`].
    more: usize,
}

impl LostClaims {
    /// Adds the lost frontends of these ports of `service`.
    pub(crate) fn look<'a>(
        &mut self,
        model: &Model,
        service: &ObjectKey,
        ports: impl Iterator<Item = &'a PortKey>,
    ) {
        let claimed = ports.filter_map(|key| model.ports.get(key)).flat_map(|port| &port.claims);
        for (frontend, flags) in claimed {
            let title = Title::of(frontend, *flags);
            for key in [*frontend].into_iter().chain(model.in_the_way_of(frontend)) {
                let Some(holder) = model.holder(&key).filter(|holder| holder.port.service != *service) else {
                    continue;
                };
                let why = match holder.title.cmp(&title) {
                    Ordering::Less => format!("as its {}", holder.title.name()),
                    Ordering::Equal => "and is older".to_owned(),
                    // An externalIP that shadows the nodePort, of the Service that has the nodePort, too.
                    Ordering::Greater => continue,
                };
                if self.sentences.len() >= REASONS {
                    self.more += 1;
                    continue;
                }
                let (name, of) = (FrontendName(&key), &holder.port.service);
                let sentence = format!("{name} is not served: Service {of} has it {why}");
                // An externalIP that shadows the Service's own nodePort is met twice.
                if !self.sentences.contains(&sentence) {
                    self.sentences.push(sentence);
                }
            }
        }
    }

    /// Returns a sentence for each lost frontend, in order, up to the limit, and one for the number of the others.
    pub(crate) fn into_sentences(mut self) -> Vec<String> {
        self.sentences.sort();
        if self.more > 0 {
            self.sentences
                .push(format!("{} more frontends are not served: other Services have them", self.more));
        }
        self.sentences
    }
}

/// A frontend in the notation of users.
pub(crate) struct FrontendName<'a>(pub(crate) &'a FrontendKey);

impl std::fmt::Display for FrontendName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let FrontendKey { addr, port, proto, kind } = self.0;
        let proto = proxy_common::abi::proto::name(*proto);
        if *kind == FrontendKind::Address as u8 {
            write!(f, "address {addr}")
        } else if *kind == FrontendKind::NodePort as u8 {
            write!(f, "nodePort {port}/{proto} ({})", addr.family())
        } else {
            write!(f, "{}/{proto}", std::net::SocketAddr::new(addr.to_ip(), port.get()))
        }
    }
}
