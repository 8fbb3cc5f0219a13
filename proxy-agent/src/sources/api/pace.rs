//! Pauses before the next try: longer after each failure, and random, so that agents do not retry at the same time.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

/// Maximum of the first pause.
const FIRST: Duration = Duration::from_millis(800);
/// Maximum of any pause: the agent asks the API server within this time after the server is back.
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// Time since the last failure after which earlier failures do not count. It is much longer than a pause, because a try
/// may itself take a while.
const FORGET: Duration = Duration::from_secs(120);

/// Pauses after consecutive failures.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Number of consecutive failures, and time of the last one.
    failures: u32,
    last: Option<Instant>,
}

impl Pace {
    /// Returns the pause after a failure at `now`: a random time in the upper half of a span that doubles with each
    /// failure. The agents of a cluster lose their server together, and must not come back to it together.
    pub(super) fn pause(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) >= FORGET) {
            self.failures = 0;
        }
        let span = FIRST.saturating_mul(2_u32.saturating_pow(self.failures)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.last = Some(now);
        between(span / 2, span)
    }

    /// Forgets earlier failures after a success.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Returns a random time in the range.
pub(super) fn between(least: Duration, most: Duration) -> Duration {
    // Each `RandomState` has other keys, derived from a random number that the kernel gave at the start.
    let draw = RandomState::new().hash_one(0) >> 32;
    least + most.saturating_sub(least).mul_f64(draw as f64 / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_ceiling_and_differ() {
        let start = Instant::now();
        let pauses = paused(start);
        for (index, pause) in (0_u32..).zip(&pauses) {
            let span = (FIRST * 2_u32.pow(index)).min(LONGEST);
            assert!((span / 2..=span).contains(pause), "{index}: {pauses:?}");
        }
        assert_ne!(pauses, paused(start));
        // The draws differ and are spread over the range.
        let draws: Vec<Duration> = (0..100).map(|_| between(FIRST, 2 * FIRST)).collect();
        assert!(draws.iter().any(|draw| *draw < FIRST * 5 / 4), "{draws:?}");
        assert!(draws.iter().any(|draw| *draw > FIRST * 7 / 4), "{draws:?}");
    }

    fn paused(start: Instant) -> Vec<Duration> {
        let mut pace = Pace::default();
        let mut now = start;
        let pauses = std::iter::from_fn(|| {
            let pause = pace.pause(now);
            now += pause;
            Some(pause)
        });
        pauses.take(12).collect::<Vec<_>>()
    }

    #[test]
    fn success_and_time_make_up_for_failures() {
        let mut pace = Pace::default();
        let start = Instant::now();
        let later = (0..5).map(|_| pace.pause(start)).max();
        assert!(later > Some(FIRST));
        pace.reset();
        assert!(pace.pause(start) <= FIRST);
        assert!(pace.pause(start + FORGET) <= FIRST);
        assert!(pace.pause(start + FORGET + FORGET / 2) >= FIRST);
        assert_eq!(between(FIRST, FIRST), FIRST);
    }
}
