//! Limits on the size of one Service.
//!
//! A Service is a small object, but the state to program for it is a product: each of its ports is served at each of
//! its addresses, has each of its endpoints, and admits each of its source ranges. The products are counted before
//! any of that state is built.

use std::fmt;

/// Limits for one Service. A Service above a limit is not served at all, because its owner could not rely on any
/// particular part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Frontends: every port at every address, over both families.
    pub frontends: u32,
    /// Endpoints of all ports, as the slices name them.
    pub endpoints: u32,
    /// Source ranges of all ports.
    pub source_ranges: u32,
}

impl Budget {
    /// A Kubernetes object has at most 1.5 MiB (etcd), so at most some 16 000 ports. All of them may have a clusterIP
    /// and a load-balancer address of both families, which makes 64 000 frontends. 10 000 endpoints may have six
    /// ports in both families, and six ports may admit 10 000 source ranges.
    pub(crate) const DEFAULT: Self = Self { frontends: 1 << 16, endpoints: 1 << 17, source_ranges: 1 << 16 };
}

impl Default for Budget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Limits for one Service, and for all Services of a namespace together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Limits for one Service.
    pub service: Budget,
    /// Limits for a namespace. The source counts its usage (`sources/api/tenants/`).
    pub namespace: Budget,
}

impl Budgets {
    /// 10 000 Services of one namespace may each have four ports at six addresses, nodePorts included, and
    /// twenty-five endpoints, with four ports or with topology hints. In addition, one Service may have 100 000
    /// endpoints.
    pub(crate) const DEFAULT: Self = Self {
        service: Budget::DEFAULT,
        namespace: Budget { frontends: 1 << 18, endpoints: 1 << 20, source_ranges: 1 << 18 },
    };
}

impl Default for Budgets {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Size of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// As [`Budget::frontends`].
    pub(super) frontends: usize,
    /// As [`Budget::endpoints`].
    pub(super) endpoints: usize,
    /// As [`Budget::source_ranges`].
    pub(super) source_ranges: usize,
}

impl Demand {
    /// Returns one sentence for each field that exceeds `budget`.
    pub(super) fn beyond(&self, budget: &Budget) -> Vec<String> {
        let sentence = |fields, asked: usize, what, may: u32, flag| {
            (asked > may as usize).then(|| Beyond { fields, asked, what, may, flag }.to_string())
        };
        [
            sentence(
                "spec.ports at spec.clusterIPs, spec.externalIPs and status.loadBalancer",
                self.frontends,
                "frontends",
                budget.frontends,
                "--max-service-frontends",
            ),
            sentence(
                "spec.ports in its EndpointSlices",
                self.endpoints,
                "endpoints",
                budget.endpoints,
                "--max-service-endpoints",
            ),
            sentence(
                "spec.ports with spec.loadBalancerSourceRanges",
                self.source_ranges,
                "source ranges",
                budget.source_ranges,
                "--max-service-source-ranges",
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

struct Beyond {
    fields: &'static str,
    asked: usize,
    what: &'static str,
    may: u32,
    flag: &'static str,
}

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fields, asked, what, may, flag } = self;
        write!(f, "{fields} make {asked} {what}, more than the {may} of {flag}: the Service is not served")
    }
}
