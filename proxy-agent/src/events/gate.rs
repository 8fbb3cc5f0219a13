//! Which Events are written: each once, and not too many. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Event;

/// An Event that was written this long ago may be written again.
const FORGET: Duration = Duration::from_secs(600);
/// Events that may be written at once.
const BURST: u32 = 25;
/// One more may be written each time this much has passed.
const PER_EVENT: Duration = Duration::from_secs(10);

/// What becomes of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is written.
    Write,
    /// The very same has been written not long ago.
    Known,
    /// Too many others have been written.
    TooMany,
}

/// The judge, with its memory: no larger than what may be written in [`FORGET`].
#[derive(Debug)]
pub(super) struct Gate {
    written: BTreeMap<Event, Instant>,
    /// Events that may be written.
    tokens: u32,
    /// As of when.
    at: Instant,
}

impl Gate {
    /// At `now` nothing has been written.
    pub(super) fn new(now: Instant) -> Self {
        Self { written: BTreeMap::new(), tokens: BURST, at: now }
    }

    /// Judges an Event, and takes it for written if it may be.
    pub(super) fn judge(&mut self, event: &Event, now: Instant) -> Verdict {
        self.written.retain(|_, at| now.saturating_duration_since(*at) < FORGET);
        while self.tokens < BURST && now.saturating_duration_since(self.at) >= PER_EVENT {
            self.tokens += 1;
            self.at += PER_EVENT;
        }
        if self.tokens == BURST {
            self.at = now;
        }
        if self.written.contains_key(event) {
            return Verdict::Known;
        }
        match self.tokens.checked_sub(1) {
            None => Verdict::TooMany,
            Some(left) => {
                self.tokens = left;
                self.written.insert(event.clone(), now);
                Verdict::Write
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ObjectKey;

    fn event(name: &str, note: &str) -> Event {
        Event::problem(ObjectKey::new("a", name), note.to_owned())
    }

    #[test]
    fn the_same_is_written_once_in_a_while() {
        let t0 = Instant::now();
        let mut gate = Gate::new(t0);
        assert_eq!(gate.judge(&event("s", "x"), t0), Verdict::Write);
        assert_eq!(gate.judge(&event("s", "x"), t0 + FORGET / 2), Verdict::Known);
        // Another note, object or reason is something else.
        assert_eq!(gate.judge(&event("s", "y"), t0), Verdict::Write);
        assert_eq!(gate.judge(&event("t", "x"), t0), Verdict::Write);
        let port = Event::check_port_failed(ObjectKey::new("a", "s"), "x".to_owned());
        assert_eq!(gate.judge(&port, t0), Verdict::Write);
        assert_eq!(gate.judge(&event("s", "x"), t0 + FORGET), Verdict::Write);
        assert_eq!(gate.written.len(), 1, "the memory is bounded");
    }

    #[test]
    fn a_flood_is_cut_off_and_passes_drop_by_drop() {
        let t0 = Instant::now();
        let mut gate = Gate::new(t0);
        let mut written = |range: std::ops::Range<u32>, now| {
            range.filter(|n| gate.judge(&event("s", &n.to_string()), now) == Verdict::Write).count()
        };
        assert_eq!(written(0..1000, t0), BURST as usize);
        assert_eq!(written(1000..2000, t0 + PER_EVENT - Duration::from_millis(1)), 0);
        assert_eq!(written(2000..3000, t0 + PER_EVENT), 1);
        assert_eq!(written(3000..4000, t0 + 3 * PER_EVENT), 2);
        assert_eq!(written(4000..5000, t0 + 1000 * PER_EVENT), BURST as usize);
    }
}
