//! Answers of the hooks to the kernel.

/// Answer of the hook to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The call goes on with the address unchanged: the address is not ours, or the packet edge decides on
    /// what follows.
    Pass,
    /// The call goes on with the address rewritten.
    Translated,
    /// The call fails with ECONNREFUSED (EPERM on kernels that cannot return it).
    Reject,
    /// The call fails with EHOSTUNREACH (EPERM likewise): the packet would have to be dropped, and no packet
    /// edge would drop it.
    Drop,
    /// The call fails with ENOBUFS (EPERM likewise): the record could not be stored, so nothing was
    /// translated.
    Fail,
}

impl Verdict {
    /// Returns [`Verdict::Pass`] if `not` holds, and the verdict itself otherwise.
    #[inline(always)]
    pub(super) fn unless(self, not: bool) -> Self {
        if not { Self::Pass } else { self }
    }
}
