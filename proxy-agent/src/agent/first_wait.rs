//! Wait of a start for facts that only the Node object can tell: pure.
//!
//! The Node is watched, so it is not requested again and again. Its state is judged whenever something arrives, and
//! when the time is over. The time begins with the first full list: before that, it is unknown what the Node lacks.

use std::time::{Duration, Instant};

use crate::reconcile::cluster::Node;

/// Time that the Node's IPs are waited for.
pub(crate) const FOR_IPS: Duration = Duration::from_secs(30);
/// Time that the Node's podCIDRs are waited for, where pods are recognized by them.
pub(crate) const FOR_POD_CIDRS: Duration = Duration::from_secs(5 * 60);

/// Facts that a start needs of the Node, and the start of the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Time when the wait began.
    pub(crate) since: Instant,
    /// Whether to wait for the Node's IPs; the start does without them after the time.
    pub(crate) ips: bool,
    /// Whether to wait for the Node's podCIDRs; the start cannot do without them.
    pub(crate) pod_cidrs: bool,
}

/// Decision about the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start: everything that a start needs, or can have, is there.
    Start,
    /// Something is missing: decide again at this time.
    Wait {
        /// Time to decide again.
        until: Instant,
        /// Reason for the wait, as a clause.
        reason: &'static str,
    },
    /// Give up: there is no start without podCIDRs.
    GiveUp,
}

impl Patience {
    /// Returns the decision at `now`, if this is all that is known of the Node.
    pub(crate) fn judge(&self, node: &Node, now: Instant) -> Decision {
        let (ips_until, pod_cidrs_until) = (self.since + FOR_IPS, self.since + FOR_POD_CIDRS);
        if self.ips && node.primary.is_none() && now < ips_until {
            let reason = "the Node has not appeared with an IP";
            return Decision::Wait { until: ips_until, reason };
        }
        match self.pod_cidrs && node.pod_cidrs.is_empty() {
            false => Decision::Start,
            true if now >= pod_cidrs_until => Decision::GiveUp,
            true => {
                Decision::Wait { until: pod_cidrs_until, reason: "the Node has not appeared with podCIDRs" }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::addr::Family;

    use super::*;

    fn node(ips: bool, pod_cidrs: bool) -> Node {
        Node {
            primary: ips.then_some(Family::V4),
            pod_cidrs: pod_cidrs
                .then(|| crate::config::lenient::prefix("10.64.1.0/24").unwrap())
                .into_iter()
                .collect(),
            ..Node::default()
        }
    }

    #[test]
    fn p233_a_node_without_ips_is_waited_for_and_then_done_without() {
        let since = Instant::now();
        let second = Duration::from_secs(1);
        let patience = Patience { since, ips: true, pod_cidrs: false };
        assert_eq!(patience.judge(&node(true, false), since), Decision::Start);
        for after in [0, 29] {
            let decision = patience.judge(&node(false, true), since + after * second);
            assert!(
                matches!(decision, Decision::Wait { until, .. } if until == since + 30 * second),
                "{decision:?}"
            );
        }
        assert_eq!(patience.judge(&node(false, false), since + 30 * second), Decision::Start);
        let manifests = Patience { ips: false, ..patience };
        assert_eq!(manifests.judge(&node(false, false), since), Decision::Start);
    }

    #[test]
    fn p242_pod_cidrs_are_waited_for_longer_and_needed() {
        let since = Instant::now();
        let second = Duration::from_secs(1);
        let patience = Patience { since, ips: true, pod_cidrs: true };
        assert_eq!(patience.judge(&node(true, true), since), Decision::Start);
        for (ips, pod_cidrs, after, waits) in
            [(false, true, 29, 30), (true, false, 0, 300), (false, false, 31, 300)]
        {
            let decision = patience.judge(&node(ips, pod_cidrs), since + after * second);
            assert!(
                matches!(decision, Decision::Wait { until, .. } if until == since + waits * second),
                "{decision:?} after {after} s"
            );
        }
        for (ips, pod_cidrs, after, decision) in [
            (false, true, 30, Decision::Start),
            (true, false, 300, Decision::GiveUp),
            (true, true, 300, Decision::Start),
        ] {
            assert_eq!(
                patience.judge(&node(ips, pod_cidrs), since + after * second),
                decision,
                "after {after} s"
            );
        }
    }
}
