//! How much one Service may ask for.
//!
//! A Service is small, and what it asks for is a product: each of its ports is to be had at each of its addresses, has each
//! of its endpoints, and admits each of its source ranges. The products are counted before anything is made of them.

use std::fmt;

/// What one Service may ask for at most. A Service that asks for more is not served at all: which part of it would be is
/// nothing that its owner could rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Frontends: addresses and ports together, over both families.
    pub frontends: u32,
    /// Endpoints of all ports, as the slices name them.
    pub endpoints: u32,
    /// Source ranges of all ports.
    pub source_ranges: u32,
}

impl Budget {
    /// An object of Kubernetes has at most 1.5 MiB (etcd), so at most some 16 000 ports. All of them may have a clusterIP and
    /// a load-balancer address of both families, which makes 64 000 frontends. 10 000 endpoints may have six ports in both
    /// families, and six ports may admit 10 000 source ranges.
    pub const DEFAULT: Self = Self { frontends: 1 << 16, endpoints: 1 << 17, source_ranges: 1 << 16 };
}

impl Default for Budget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What one Service may ask for, and all of a namespace together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Of one Service.
    pub service: Budget,
    /// Of a namespace. The source counts it (`sources/api/tenants/`).
    pub namespace: Budget,
}

impl Budgets {
    /// 10 000 Services of one namespace may have four ports at six addresses, nodePorts among them, and twenty-five endpoints
    /// each, with four ports or with topology hints; beside them one Service may have 100 000 endpoints.
    pub const DEFAULT: Self = Self {
        service: Budget::DEFAULT,
        namespace: Budget { frontends: 1 << 18, endpoints: 1 << 20, source_ranges: 1 << 18 },
    };
}

impl Default for Budgets {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a Service asks for.
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
    /// What goes beyond `budget`, a sentence for each field.
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
