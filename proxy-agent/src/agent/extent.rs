//! Extent of the next turn: pure.

/// Extent of the next turn, beside the Services that have changed. Each value includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Extent {
    /// Services that have changed.
    #[default]
    Services,
    /// The node's own tables as well.
    Node,
    /// Every Service, because other endpoints may be near.
    Zone,
    /// Everything, compared with what the maps hold: at the start, and after a failure.
    Everything,
}

impl Extent {
    /// Makes the extent at least as wide as `extent`.
    pub(super) fn widen(&mut self, extent: Self) {
        *self = (*self).max(extent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_only_ever_becomes_wider() {
        let mut extent = Extent::default();
        for (widened, expected) in [
            (Extent::Node, Extent::Node),
            (Extent::Services, Extent::Node),
            (Extent::Everything, Extent::Everything),
            (Extent::Zone, Extent::Everything),
        ] {
            extent.widen(widened);
            assert_eq!(extent, expected);
        }
        assert!(Extent::Zone > Extent::Node, "another zone changes the node's tables, too");
    }
}
