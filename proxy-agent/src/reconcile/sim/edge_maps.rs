//! The packet edge's maps as ordered maps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use proxy_common::abi::{
    Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, IfIndex, Nanos, ServiceCounters, ServiceId,
};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::{FlowCell, Tier};

/// The maps of the packet edge that no plan writes.
#[derive(Debug, Default)]
pub struct EdgeMaps {
    pub(super) flows: [RefCell<BTreeMap<FlowKey, Record>>; 2],
    pub(super) index: [RefCell<BTreeMap<FlowKey, FlowRef>>; 2],
    pub(super) fragments: RefCell<BTreeMap<FragmentKey, FragmentPorts>>,
    pub(super) counters: RefCell<BTreeMap<ServiceId, ServiceCounters>>,
    /// `DEVICES`.
    pub devices: RefCell<BTreeMap<IfIndex, Device>>,
    /// Maximal number of elements of each of `FLOWS` and `NEW_FLOWS`; `None` for any number.
    pub room: [Cell<Option<usize>>; 2],
}

/// A record in place. It may outlive its entry in the map, as in the kernel.
#[derive(Clone, Debug)]
pub struct Record(pub Rc<Cell<Flow>>);

pub(super) const fn slot(tier: Tier) -> usize {
    match tier {
        Tier::Assured => 0,
        Tier::New => 1,
    }
}

impl EdgeMaps {
    /// Returns the records of a tier.
    pub fn records(&self, tier: Tier) -> Vec<(FlowKey, Flow)> {
        self.flows[slot(tier)].borrow().iter().map(|(key, record)| (*key, record.get())).collect()
    }

    /// Returns the index entries of a tier.
    pub fn entries(&self, tier: Tier) -> Vec<(FlowKey, FlowRef)> {
        self.index[slot(tier)].borrow().iter().map(|(key, target)| (*key, *target)).collect()
    }

    /// Removes an index entry, as the LRU may at any time.
    pub fn evict_index(&self, key: &FlowKey) -> Option<FlowRef> {
        self.index[slot(Tier::New)].borrow_mut().remove(key)
    }

    /// Removes a record, as the LRU may at any time.
    pub fn evict_flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows[slot(Tier::New)].borrow_mut().remove(key).map(|record| record.get())
    }

    /// Reuses the element of a record for another one, as the kernel may while a reader has it.
    ///
    /// # Panics
    /// If there is no such record.
    pub fn recycle(&self, tier: Tier, old: &FlowKey, new: FlowKey, flow: Flow) {
        let mut records = self.flows[slot(tier)].borrow_mut();
        let record = records.remove(old).expect("a record");
        record.0.set(flow);
        records.insert(new, record);
    }

    /// Sets the counters of a Service to zero.
    pub(super) fn forget_counters(&self, service: ServiceId) {
        self.counters.borrow_mut().remove(&service);
    }

    /// Returns the counters of a Service.
    pub fn service_counters(&self, service: ServiceId) -> ServiceCounters {
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

    fn set_answered_by(&self, check: u32, answered_by: IfIndex) {
        self.set(check, |flow| Flow { answered_by, ..flow });
    }

    fn set_asked_by(&self, check: u32, asked_by: IfIndex) {
        self.set(check, |flow| Flow { asked_by, ..flow });
    }

    fn set_last_seen(&self, check: u32, last_seen: Nanos) {
        self.set(check, |flow| Flow { last_seen, ..flow });
    }

    fn set_snat(&self, check: u32, snat: Addr, snat_port: Be16) {
        self.set(check, |flow| Flow { snat, snat_port, ..flow });
    }
}
