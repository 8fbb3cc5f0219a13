//! Which connected UDP sockets have lost their backend (semantics: kube-proxy's UDP conntrack cleanup).

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::backend::flags::SERVING;
use proxy_common::abi::{FrontendKey, SocketRecord, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;

use crate::model::Model;

/// The serving backends behind every UDP frontend, as of one moment.
#[derive(Debug, Default)]
pub struct Serving {
    frontends: BTreeMap<FrontendKey, u32>,
    backends: BTreeMap<u32, BTreeSet<(Addr, Be16)>>,
}

impl Serving {
    /// Takes the UDP part of `model`.
    pub fn of(model: &Model) -> Self {
        let udp = model.frontends.iter().filter(|(key, _)| key.proto == proto::UDP);
        let serving = |port: &crate::model::Port| {
            let serving = port.backends.iter().filter(|b| b.state.flags & SERVING != 0);
            serving.map(|b| (b.addr, b.port)).collect()
        };
        let ports = model.ports.iter().filter(|(key, _)| key.proto == proto::UDP);
        Self {
            frontends: udp.map(|(key, value)| (*key, value.service)).collect(),
            backends: ports.map(|(_, port)| (port.id, serving(port))).collect(),
        }
    }

    /// Whether the socket's backend has left while others serve. Sockets of a Service that is gone, or that nothing
    /// serves, are left alone.
    pub fn is_stale(&self, record: &SocketRecord) -> bool {
        let exact = FrontendKey::exact(record.vip, record.vip_port, proto::UDP);
        let node_port = FrontendKey::node_port(record.vip.unspecified(), record.vip_port, proto::UDP);
        let service = self.frontends.get(&exact).or_else(|| self.frontends.get(&node_port));
        let Some(serving) = service.and_then(|service| self.backends.get(service)) else { return false };
        let serves = serving.contains(&(record.backend_addr, record.backend_port));
        // A socket may have been connected to a pod itself, and send datagrams to a VIP besides.
        record.is_connected() && !serving.is_empty() && !serves
    }
}
