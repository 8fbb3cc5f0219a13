//! Each suite's share of the table: the checks that it can make, and the names of its tests.

use super::{Case, Check, Proto, all};

/// Whether the pods' sockets are seen by the programs of their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// Pods meet the socket edge, as the host does, and the packet edge for connections that the socket edge leaves
    /// alone. All other senders meet the packet edge.
    Seen,
    /// The packets of pods meet the packet edge.
    Unseen,
}

/// Returns the names of the tests that the table has in the suite `pure`, by id.
pub fn pure_tests() -> Vec<String> {
    all().iter().filter(|case| case.checks().any(Check::is_pure)).map(Case::test_name).collect()
}

/// Returns the names of the tests that the table has in the suite `lab`, by id.
pub fn lab_tests(pods: Pods) -> Vec<String> {
    let suffix = match pods {
        Pods::Seen => "",
        Pods::Unseen => "_packets",
    };
    all().iter().filter(|case| case.is_live(pods)).map(|case| case.test_name() + suffix).collect()
}

impl Case {
    /// Returns whether the lab can make one of the case's checks.
    pub fn is_live(&self, pods: Pods) -> bool {
        self.checks().any(|check| check.is_live(pods))
    }

    fn checks(&self) -> impl Iterator<Item = &Check> {
        self.steps.iter().flat_map(|step| &step.checks)
    }
}

impl Check {
    /// Returns whether the check can be made without a kernel. Flows need packets and real sockets.
    pub const fn is_pure(&self) -> bool {
        !matches!(self, Self::Open(..) | Self::Say(..))
    }

    /// Returns whether the check can be made in the lab, and has to be made: a check that does not depend on whether
    /// pods are seen is made once. (A [`Check::Say`] is made if its socket was opened.)
    pub fn is_live(&self, pods: Pods) -> bool {
        match self {
            // The kernels that tests run on seldom have SCTP.
            Self::Connect(connect) | Self::Open(_, connect) if connect.dest.proto == Proto::Sctp => false,
            Self::Connect(connect) => pods == Pods::Seen || connect.sender.is_pod_of_this_node(),
            // Flows need packets.
            Self::Open(_, connect) => (pods == Pods::Unseen) == connect.sender.is_pod_of_this_node(),
            Self::Say(..) => false,
            Self::Frontends(..) | Self::ClusterSet(..) | Self::AffinitySeconds(..) => pods == Pods::Seen,
        }
    }
}
