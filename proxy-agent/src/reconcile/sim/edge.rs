//! The packet edge's maps as ordered maps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use proxy_common::abi::{Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, ServiceCounters};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::{EdgeTables, FlowCell, Scratch, Tier};
use proxy_common::datapath::edge::{self, Edge, Verdict};

use super::Simulator;
use super::frame::Frame;

/// What the packet edge reads and writes beside the other maps.
#[derive(Debug, Default)]
pub struct EdgeMaps {
    flows: [RefCell<BTreeMap<FlowKey, Record>>; 2],
    index: [RefCell<BTreeMap<FlowKey, FlowRef>>; 2],
    fragments: RefCell<BTreeMap<FragmentKey, FragmentPorts>>,
    counters: RefCell<BTreeMap<u32, ServiceCounters>>,
    /// `DEVICES`.
    pub devices: RefCell<BTreeMap<u32, Device>>,
    /// How many elements each of `FLOWS` and `NEW_FLOWS` can have; `None` for any number.
    pub room: [Cell<Option<usize>>; 2],
}

/// A record in place. It may outlive its place in the map, as in the kernel.
#[derive(Clone, Debug)]
pub struct Record(Rc<Cell<Flow>>);

const fn slot(tier: Tier) -> usize {
    match tier {
        Tier::Assured => 0,
        Tier::New => 1,
    }
}

impl EdgeMaps {
    /// The records of a tier.
    pub fn records(&self, tier: Tier) -> Vec<(FlowKey, Flow)> {
        self.flows[slot(tier)].borrow().iter().map(|(key, record)| (*key, record.get())).collect()
    }

    /// The index entries of a tier.
    pub fn entries(&self, tier: Tier) -> Vec<(FlowKey, FlowRef)> {
        self.index[slot(tier)].borrow().iter().map(|(key, target)| (*key, *target)).collect()
    }

    /// Takes an index entry away, as the LRU may at any time.
    pub fn evict_index(&self, key: &FlowKey) -> Option<FlowRef> {
        self.index[slot(Tier::New)].borrow_mut().remove(key)
    }

    /// Takes a record away, as the LRU may at any time.
    pub fn evict_flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows[slot(Tier::New)].borrow_mut().remove(key).map(|record| record.get())
    }

    /// Gives the element of a record to another one, as the kernel may while a reader has it.
    ///
    /// # Panics
    /// If there is no such record.
    pub fn recycle(&self, tier: Tier, old: &FlowKey, new: FlowKey, flow: Flow) {
        let mut records = self.flows[slot(tier)].borrow_mut();
        let record = records.remove(old).expect("a record");
        record.0.set(flow);
        records.insert(new, record);
    }

    /// Makes what has been counted for a Service zero.
    pub(super) fn forget_counters(&self, service: u32) {
        self.counters.borrow_mut().remove(&service);
    }

    /// What has been counted for a Service.
    pub fn service_counters(&self, service: u32) -> ServiceCounters {
        self.counters.borrow().get(&service).copied().unwrap_or_default()
    }
}

impl Record {
    fn set(&self, check: u32, change: impl FnOnce(Flow) -> Flow) {
        let flow = self.get();
        if flow.check == check {
            self.0.set(change(flow));
        }
    }
}

impl FlowCell for Record {
    fn get(&self) -> Flow {
        self.0.get()
    }

    fn set_state(&self, check: u32, state: u32) {
        self.set(check, |flow| Flow { state, ..flow });
    }

    fn set_expected(&self, check: u32, expected: u32) {
        self.set(check, |flow| Flow { expected, ..flow });
    }

    fn set_syn(&self, check: u32, syn: u16) {
        self.set(check, |flow| Flow { syn, ..flow });
    }

    fn set_answered_by(&self, check: u32, answered_by: u32) {
        self.set(check, |flow| Flow { answered_by, ..flow });
    }

    fn set_asked_by(&self, check: u32, asked_by: u32) {
        self.set(check, |flow| Flow { asked_by, ..flow });
    }

    fn set_last_seen(&self, check: u32, last_seen: u64) {
        self.set(check, |flow| Flow { last_seen, ..flow });
    }

    fn set_snat(&self, check: u32, snat: Addr, snat_port: Be16) {
        self.set(check, |flow| Flow { snat, snat_port, ..flow });
    }
}

impl Simulator {
    /// Runs the pipeline on a packet that enters, or leaves, through its device.
    pub fn packet(&self, frame: &mut Frame, edge: Edge, egress: bool) -> Verdict {
        let mut scratch = Scratch::default();
        if egress {
            edge::egress(frame, self, edge, &mut scratch)
        } else {
            edge::ingress(frame, self, edge, &mut scratch)
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

    fn in_source_ranges(&self, service: u32, client: &Addr) -> bool {
        self.source_ranges.iter().any(|(of, range)| *of == service && range.contains(*client))
    }

    fn is_pod_source(&self, addr: &Addr) -> bool {
        self.pod_sources.iter().any(|prefix| prefix.contains(*addr))
    }

    fn device(&self, ifindex: u32) -> Option<Device> {
        self.edge.devices.borrow().get(&ifindex).copied()
    }

    fn device_flags(&self, ifindex: u32) -> u32 {
        self.device(ifindex).map_or(0, |device| device.flags)
    }

    fn count_packet(&self, service: u32, request: bool, bytes: u32) {
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

    fn count_connection(&self, service: u32) {
        self.edge.counters.borrow_mut().entry(service).or_default().connections += 1;
    }
}
