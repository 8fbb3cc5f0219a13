//! The address that endpoints see: kube-proxy's answer is in the table, Vipr's is [`seen`].
//!
//! kube-proxy rewrites sources by what the client is and what it asked for. Vipr rewrites a source where the reply
//! would not come back through the node that has translated the destination, and only there. `docs/masquerade.md` says
//! so row by row; a test compares that page with this module.

use super::{Endpoint, NODE, Sender};

/// Where the node under test meets a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// At its socket, before there is a packet.
    Socket,
    /// At the node's side of its interface: a pod of the node whose socket is not seen.
    PodInterface,
    /// At a device to the network between the nodes, or beyond.
    Device,
}

/// Whose address an endpoint sees as the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The client's own.
    Client,
    /// One of the node's that translated the destination.
    Node,
}

impl Sender {
    /// Where the node meets it, if pods' sockets are seen.
    pub fn edge(self, pods_are_seen: bool) -> Edge {
        match self {
            Self::H => Edge::Socket,
            Self::P | Self::P6 | Self::Pods | Self::L1 if pods_are_seen => Edge::Socket,
            Self::P | Self::P6 | Self::Pods | Self::L1 => Edge::PodInterface,
            Self::Q | Self::X | Self::Y | Self::X6 => Edge::Device,
        }
    }
}

/// Whose address `endpoint` sees when `sender` was translated at `edge`.
///
/// - At a socket nothing has a source address yet; the kernel chooses one afterwards, as for any connection to a pod.
/// - A pod that is its own endpoint would answer itself without the node, unless the node stands between.
/// - Any other pod of the node gets its replies through its interface, which only the node has.
/// - What came through a device and stays on the node: the endpoint's reply leaves through its interface, to this node.
/// - What goes on to another node would be answered from there, past this node.
pub fn seen(endpoint: &Endpoint, sender: Sender, edge: Edge) -> Seen {
    let hairpin = sender.addresses().contains(&endpoint.ip);
    match edge {
        Edge::Socket => Seen::Client,
        Edge::PodInterface if hairpin => Seen::Node,
        Edge::PodInterface => Seen::Client,
        Edge::Device if endpoint.node == NODE => Seen::Client,
        Edge::Device => Seen::Node,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::cases::{Check, Connect, Expect, Source, all};

    /// One line for each sender of each case for which kube-proxy's answer is known.
    fn rows() -> Vec<String> {
        let mut rows = BTreeMap::new();
        for case in all() {
            for check in case.steps.iter().flat_map(|step| &step.checks) {
                let Check::Connect(Connect { sender, expect, .. }) = check else { continue };
                let (Expect::Spread(targets, source) | Expect::Sticky(targets, source)) = expect else {
                    continue;
                };
                let theirs = match source {
                    Source::Kept => "client",
                    Source::Masqueraded => "node",
                    Source::Unsaid => continue,
                };
                for target in targets {
                    let ours =
                        |pods_are_seen| match seen(&target.endpoint, *sender, sender.edge(pods_are_seen)) {
                            Seen::Client => "client",
                            Seen::Node => "node",
                        };
                    let ours = match (ours(true), ours(false)) {
                        (same, other) if same == other => same.to_owned(),
                        (socket, packets) => format!("{socket}; {packets} if its socket is not seen"),
                    };
                    let place = match (sender.addresses().contains(&target.endpoint.ip), target.endpoint.node)
                    {
                        (true, _) => "itself",
                        (false, NODE) => "this node",
                        (false, _) => "another node",
                    };
                    let sender = match sender {
                        Sender::P | Sender::P6 | Sender::Pods | Sender::L1 => "pod of this node",
                        Sender::Q => "pod of another node",
                        Sender::H => "host",
                        Sender::X | Sender::Y | Sender::X6 => "outside",
                    };
                    let key = (sender, place, theirs, ours);
                    let ids: &mut Vec<&str> = rows.entry(key).or_default();
                    if ids.last() != Some(&case.id) {
                        ids.push(case.id);
                    }
                }
            }
        }
        rows.into_iter()
            .map(|((sender, place, theirs, ours), ids)| {
                format!("| {sender} | {place} | {theirs} | {ours} | {} |", ids.join(" "))
            })
            .collect()
    }

    #[test]
    fn the_page_says_what_the_code_says() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/masquerade.md");
        let page = std::fs::read_to_string(page).expect("docs/masquerade.md");
        let table: Vec<&str> =
            page.lines().skip_while(|line| !line.starts_with("| sender |")).skip(2).collect();
        let table: Vec<&str> = table.into_iter().take_while(|line| line.starts_with('|')).collect();
        assert_eq!(table, rows(), "the rows of docs/masquerade.md should be:\n{}\n", rows().join("\n"));
    }
}
