//! The packet edge's pipeline on maps without a kernel.

use std::cell::Cell;
use std::rc::Rc;

use proxy_common::abi::{Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, IfIndex, ServiceId};
use proxy_common::addr::Addr;
use proxy_common::datapath::edge::tables::{EdgeTables, Tier};
use proxy_common::datapath::edge::work::Scratch;
use proxy_common::datapath::edge::work::Work;
use proxy_common::datapath::edge::{self, Role, Verdict, flows};

use super::Simulator;
use super::edge_maps::{Record, slot};
use super::frame::Frame;

impl Simulator {
    /// Runs the pipeline on a packet that enters or leaves through its device.
    pub fn packet(&self, frame: &mut Frame, role: Role, egress: bool) -> Verdict {
        let mut scratch = Scratch::default();
        if egress {
            edge::egress(frame, self, role, &mut scratch)
        } else {
            edge::ingress(frame, self, role, &mut scratch)
        }
    }
}

impl EdgeTables for Simulator {
    type Cell = Record;

    fn flow(&self, tier: Tier, key: &FlowKey) -> Option<Record> {
        self.edge.flows[slot(tier)].borrow().get(key).cloned()
    }

    fn add_flow(&self, tier: Tier, key: &FlowKey, flow: &Flow) -> bool {
        let mut flows = self.edge.flows[slot(tier)].borrow_mut();
        if flows.contains_key(key) || self.edge.room[slot(tier)].get().is_some_and(|room| flows.len() >= room)
        {
            return false;
        }
        flows.insert(*key, Record(Rc::new(Cell::new(*flow))));
        true
    }

    fn remove_flow(&self, tier: Tier, key: &FlowKey) {
        self.edge.flows[slot(tier)].borrow_mut().remove(key);
    }

    fn index(&self, tier: Tier, key: &FlowKey) -> Option<FlowRef> {
        self.edge.index[slot(tier)].borrow().get(key).copied()
    }

    fn add_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool {
        let mut index = self.edge.index[slot(tier)].borrow_mut();
        let free = !index.contains_key(key);
        index.entry(*key).or_insert(*target);
        free
    }

    fn put_index(&self, tier: Tier, key: &FlowKey, target: &FlowRef) -> bool {
        self.edge.index[slot(tier)].borrow_mut().insert(*key, *target);
        true
    }

    fn remove_index(&self, tier: Tier, key: &FlowKey) {
        self.edge.index[slot(tier)].borrow_mut().remove(key);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.edge.fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) -> bool {
        self.edge.fragments.borrow_mut().insert(*key, *ports);
        true
    }

    fn in_source_ranges(&self, service: ServiceId, client: &Addr) -> bool {
        self.source_ranges.iter().any(|(of, range)| *of == service && range.contains(*client))
    }

    fn is_pod_source(&self, addr: &Addr) -> bool {
        self.pod_sources.iter().any(|prefix| prefix.contains(*addr))
    }

    fn device(&self, ifindex: IfIndex) -> Option<Device> {
        self.edge.devices.borrow().get(&ifindex).copied()
    }

    fn device_flags(&self, ifindex: IfIndex) -> u32 {
        self.device(ifindex).map_or(0, |device| device.flags)
    }

    fn count_packet(&self, service: ServiceId, request: bool, bytes: u32) {
        let mut counters = self.edge.counters.borrow_mut();
        let counters = counters.entry(service).or_default();
        let (packets, sum) = if request {
            (&mut counters.request_packets, &mut counters.request_bytes)
        } else {
            (&mut counters.reply_packets, &mut counters.reply_bytes)
        };
        *packets += 1;
        *sum += u64::from(bytes);
    }

    fn count_connection(&self, service: ServiceId) {
        self.edge.counters.borrow_mut().entry(service).or_default().connections += 1;
    }

    fn try_source(&self, work: &mut Work, tier: Tier, spare: bool) -> bool {
        flows::try_source(self, work, tier, spare)
    }

    fn try_tuple(&self, work: &mut Work, own: bool) -> bool {
        flows::try_tuple(self, work, own)
    }
}
