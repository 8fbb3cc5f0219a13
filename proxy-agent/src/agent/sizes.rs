//! Sizes of the maps for the desired state.

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};

use crate::bpf::dataplane::Sizes;
use crate::reconcile::desired::DesiredService;
use crate::reconcile::store::Capacity;

/// Number of elements that Services need.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Needs {
    ports: usize,
    frontends: usize,
    backends: usize,
    slots: usize,
    source_ranges: usize,
}

impl Needs {
    /// Adds the needs of a Service.
    pub(super) fn add(&mut self, service: &DesiredService) {
        for port in &service.ports {
            self.ports += 1;
            self.frontends += port.frontends.len();
            self.backends += port.backends.len();
            self.source_ranges += port.source_ranges.len();
            for set in [IN_CLUSTER, IN_LOCAL] {
                self.slots += port.backends.iter().filter(|backend| backend.flags & set != 0).count();
            }
        }
    }

    /// Returns the sizes that the maps must have at least, with a quarter to spare, and the sizes that they are made
    /// with: twice the need, over floors that cost little. Maps between the two are kept.
    pub(super) fn sizes(self, flows: u32) -> Sizes {
        Sizes {
            least: self.capacity(|count| count + count / 4, [1; 5]),
            want: self.capacity(|count| count * 2, [16_384, 8_192, 65_536, 131_072, 65_536]),
            flows,
        }
    }

    fn capacity(self, scale: fn(usize) -> usize, floors: [u32; 5]) -> Capacity {
        let [frontends, services, backends, slots, source_ranges] = floors;
        Capacity {
            frontends: size(scale(self.frontends), frontends),
            services: size(scale(self.ports), services),
            backends: size(scale(self.backends), backends),
            // A changed set is written beside the old one.
            slots: size(scale(self.slots + self.slots / 2), slots),
            source_ranges: size(scale(self.source_ranges), source_ranges),
        }
    }
}

fn size(count: usize, floor: u32) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).clamp(floor, u32::MAX / 64)
}
