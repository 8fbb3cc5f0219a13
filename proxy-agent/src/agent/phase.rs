//! Progress of a start, from the first full list to readiness: pure.

use super::first_wait::Patience;

/// Progress of a start. It never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The source has not delivered its first full list.
    Listing,
    /// The first programming waits for facts of the Node.
    AwaitingNode(Patience),
    /// The maps follow the cluster; readiness has not been announced.
    Starting {
        /// Number of attached devices, if nothing keeps this node from being ready.
        attached: Option<usize>,
    },
    /// Readiness has been announced. The node stays ready: later failures of devices are reported as their problems.
    Ready,
}

impl Phase {
    /// Takes in a pass over the devices, which has attached this number of them. `held` tells whether something keeps
    /// the node from being ready. Returns whether that has to be told.
    pub(super) fn passed(&mut self, attached: usize, held: bool) -> bool {
        match self {
            Self::Starting { attached: to_announce } => {
                *to_announce = (!held).then_some(attached);
                held
            }
            Self::Listing | Self::AwaitingNode(_) | Self::Ready => false,
        }
    }

    /// Returns the number of attached devices if readiness is to be announced. It then counts as announced.
    pub(super) fn announce(&mut self) -> Option<usize> {
        let Self::Starting { attached: Some(attached) } = *self else { return None };
        *self = Self::Ready;
        Some(attached)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_announced_once_and_only_while_no_device_holds_it() {
        let mut phase = Phase::Starting { attached: None };
        assert_eq!(phase.announce(), None, "no pass yet");
        assert!(phase.passed(2, true));
        assert_eq!(phase.announce(), None, "held");
        assert!(!phase.passed(2, false));
        // The pass after that counts.
        assert!(phase.passed(1, true));
        assert_eq!(phase.announce(), None);
        assert!(!phase.passed(3, false));
        assert_eq!(phase.announce(), Some(3));
        assert_eq!((phase.announce(), phase), (None, Phase::Ready));
        // A node that is ready stays ready.
        assert!(!phase.passed(0, true));
        assert_eq!((phase.announce(), phase), (None, Phase::Ready));
    }

    #[test]
    fn a_pass_changes_nothing_before_the_start() {
        let mut phase = Phase::Listing;
        assert!(!phase.passed(1, false) && !phase.passed(1, true));
        assert_eq!((phase.announce(), phase), (None, Phase::Listing));
    }
}
