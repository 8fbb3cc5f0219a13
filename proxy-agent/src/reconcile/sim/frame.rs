//! A packet on the host: the operations that the TC shell performs on an skb, on a vector of bytes.

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family};
use proxy_common::datapath::edge::packet::{FURTHEST, Packet};
use proxy_common::datapath::edge::parsed::Parsed;
use proxy_common::datapath::edge::tables::EdgeTables;
use proxy_common::datapath::edge::work::Work;
use proxy_common::datapath::edge::{checksum, judge, sctp};

const MAC_HEADER: usize = 14;

/// One packet, with its MAC header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// All bytes of the packet.
    pub bytes: Vec<u8>,
    /// Index of the device that the pipeline runs on.
    pub ifindex: IfIndex,
    /// Index of the device by which the packet entered the host; 0 if it was made there.
    pub entered_by: IfIndex,
    /// Index of the device by which the host's routes lead to the packet's source; 0 if that is not known.
    pub route_back: IfIndex,
    /// Indexes of the devices by which the host's routes lead to the packet's destination.
    pub ways: Vec<IfIndex>,
    /// Index of the device that the packet has been redirected to; 0 for the one that the pipeline runs on.
    pub leaves_by: IfIndex,
}

impl Frame {
    /// Creates a packet that has come in by the device `ifindex`.
    pub fn new(bytes: Vec<u8>, ifindex: IfIndex) -> Self {
        Self {
            bytes,
            ifindex,
            entered_by: ifindex,
            route_back: IfIndex::NONE,
            ways: Vec::new(),
            leaves_by: IfIndex::NONE,
        }
    }

    fn range(&mut self, offset: u32, len: usize) -> Option<&mut [u8]> {
        let start = offset as usize;
        self.bytes.get_mut(start..start.checked_add(len)?)
    }
}

impl Packet for Frame {
    fn ethertype(&self) -> u16 {
        self.load::<2>(12).map_or(0, u16::from_be_bytes)
    }

    fn ip_offset(&self) -> u32 {
        MAC_HEADER as u32
    }

    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    fn ifindex(&self) -> IfIndex {
        self.ifindex
    }

    fn entered_by(&self) -> IfIndex {
        self.entered_by
    }

    fn route_to(&self, _family: Family, _addr: &Addr) -> IfIndex {
        // The pipeline asks for no other route.
        self.route_back
    }

    fn leave_by(&mut self, device: IfIndex, _family: Family, _source: &Addr, _destination: &Addr) -> bool {
        let leads = self.ways.contains(&device);
        if leads {
            self.leaves_by = device;
        }
        leads
    }

    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > FURTHEST {
            return None;
        }
        let start = offset as usize;
        self.bytes.get(start..start.checked_add(N)?)?.try_into().ok()
    }

    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool {
        match self.range(offset, N) {
            Some(range) => {
                range.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }

    fn store_summed<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool {
        self.store(offset, bytes)
    }

    fn fix_checksum(&mut self, offset: u32, pseudo: u32, covered: u32, zero_is_none: bool) -> bool {
        let Some(before) = self.load::<2>(offset) else { return false };
        if zero_is_none && before == [0; 2] {
            return true;
        }
        // One difference after the other, as the kernel does it: zero has two forms.
        let mut field = before;
        for difference in [pseudo, covered] {
            if difference != 0 && difference != u32::MAX {
                field = checksum::updated(field, difference);
                if zero_is_none && field == [0; 2] {
                    field = [0xff; 2];
                }
            }
        }
        self.store(offset, field)
    }

    fn insert_before_ip(&mut self, bytes: u32) -> bool {
        if self.bytes.len() < MAC_HEADER {
            return false;
        }
        self.bytes.splice(MAC_HEADER..MAC_HEADER, std::iter::repeat_n(0, bytes as usize));
        true
    }

    fn resize(&mut self, len: u32) -> bool {
        self.bytes.resize(len as usize, 0);
        true
    }

    fn sctp_moved_on(&self, change: u32, bytes: u32) -> u32 {
        sctp::moved_on(change, bytes)
    }

    fn choose(&self, tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work) {
        judge::choose(self, tables, parsed, work);
    }
}
