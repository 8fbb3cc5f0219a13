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
        // A changed set is written beside the old one.
        let need =
            [self.frontends, self.ports, self.backends, self.slots + self.slots / 2, self.source_ranges];
        let capacity = |scale: fn(usize) -> usize, floors: [u32; 5]| {
            let size = |count: usize, floor: u32| {
                u32::try_from(scale(count)).unwrap_or(u32::MAX).clamp(floor, u32::MAX / 64)
            };
            let [frontends, services, backends, slots, source_ranges] = need;
            let [f, s, b, l, r] = floors;
            Capacity {
                frontends: size(frontends, f),
                services: size(services, s),
                backends: size(backends, b),
                slots: size(slots, l),
                source_ranges: size(source_ranges, r),
            }
        };
        Sizes {
            least: capacity(|count| count + count / 4, [1; 5]),
            want: capacity(|count| count * 2, [16_384, 8_192, 65_536, 131_072, 65_536]),
            flows,
        }
    }
}
