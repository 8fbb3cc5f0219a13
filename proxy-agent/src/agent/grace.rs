//! Numbers that the plan has freed, and that running programs may still hold.

use std::io;

use tokio::task::JoinHandle;

use crate::reconcile::model::Freed;

/// Freed numbers, until the grace period is over that has begun after their last use.
#[derive(Debug, Default)]
pub(super) struct Grace {
    /// Numbers whose grace period has begun.
    waiting: Option<(JoinHandle<io::Result<()>>, Freed)>,
    /// Numbers that came later.
    later: Freed,
}

impl Grace {
    /// Adds numbers that are not in use any more.
    pub(super) fn add(&mut self, freed: Freed) {
        self.later.append(freed);
    }

    /// Begins a grace period, which is over when `wait` returns, unless one is under way or no number waits for it.
    pub(super) fn begin(&mut self, wait: fn() -> io::Result<()>) {
        if self.waiting.is_none() && !self.later.is_empty() {
            let freed = std::mem::take(&mut self.later);
            self.waiting = Some((tokio::task::spawn_blocking(wait), freed));
        }
    }

    /// Waits for the end of the grace period, and returns its numbers. Never returns while none is under way.
    pub(super) async fn over(&mut self) -> Freed {
        let Some((grace, freed)) = &mut self.waiting else { return std::future::pending().await };
        let ended = grace.await;
        let freed = std::mem::take(freed);
        self.waiting = None;
        match ended {
            Ok(Ok(())) => freed,
            failed => {
                // Without a grace period the numbers are never used again; the next full plan finds them.
                tracing::warn!(?failed, "waiting for running programs failed");
                std::future::pending().await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proxy_common::abi::BackendId;
    use tokio::time::timeout;

    use super::*;

    fn freed(backend: BackendId) -> Freed {
        Freed { backends: vec![(backend, 0)], ..Freed::default() }
    }

    async fn over(grace: &mut Grace) -> Freed {
        timeout(Duration::from_secs(5), grace.over()).await.expect("a grace period is under way")
    }

    #[tokio::test]
    async fn numbers_wait_for_a_grace_period_that_begins_after_them() {
        let mut grace = Grace::default();
        grace.begin(|| panic!("for no number"));
        grace.add(freed(BackendId(1)));
        grace.add(freed(BackendId(2)));
        grace.begin(|| Ok(()));
        grace.add(freed(BackendId(3)));
        grace.begin(|| panic!("beside another one"));
        assert_eq!(over(&mut grace).await.backends, [(BackendId(1), 0), (BackendId(2), 0)]);
        grace.begin(|| Ok(()));
        assert_eq!(over(&mut grace).await, freed(BackendId(3)));
    }

    #[tokio::test]
    async fn numbers_are_lost_without_a_grace_period_and_later_ones_are_not() {
        let mut grace = Grace::default();
        grace.add(freed(BackendId(1)));
        grace.begin(|| Err(io::ErrorKind::Other.into()));
        grace.add(freed(BackendId(2)));
        assert!(timeout(Duration::from_millis(50), grace.over()).await.is_err(), "no number comes back");
        grace.begin(|| Ok(()));
        assert_eq!(over(&mut grace).await, freed(BackendId(2)));
    }
}
