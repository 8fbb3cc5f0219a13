//! Shares of what all tenants of a cluster have together: lines of the log and of `status`, Events, time. Pure.
//!
//! A tenant is a namespace, or a file of manifests; what is about the node itself belongs to nobody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Whom an object belongs to that is named as problems name it: the namespace of `Service a/s`, the file of
/// `x.yaml, document 2`; empty for what is the node's.
pub fn tenant_of(object: &str) -> &str {
    if let Some((file, _)) = object.split_once(", document ") {
        return file;
    }
    if let Some(namespace) = object.strip_prefix("Namespace ") {
        return namespace;
    }
    let key = object.split_once(' ').map_or("", |(_, key)| key);
    match key.split_once('/') {
        Some((namespace, name)) if !name.contains(['/', ' ']) && !namespace.contains(' ') => namespace,
        _ => "",
    }
}

/// How long work rests that others can cause, after it took so long: it takes a tenth of the time at most, and begins no
/// more than once a second.
pub fn rest_after(took: Duration) -> Duration {
    (took * 9).clamp(Duration::from_secs(1), Duration::from_secs(60))
}

/// A bucket of tokens for each tenant.
#[derive(Debug)]
pub struct Shares {
    burst: u32,
    period: Duration,
    tenants: BTreeMap<Arc<str>, Bucket>,
    /// With more tenants than this, those that have all their tokens are forgotten.
    forget_at: usize,
}

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// As of when.
    at: Instant,
    /// How often there was none since there was one.
    refused: u64,
}

impl Shares {
    const FORGET_AT: usize = 64;

    /// Each tenant has `burst` at once, and one more whenever `period` has passed.
    pub const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, tenants: BTreeMap::new(), forget_at: Self::FORGET_AT }
    }

    /// Takes one for a tenant: `None` if it has none left, else how often it was refused since it got the last one.
    pub fn take(&mut self, tenant: &str, now: Instant) -> Option<u64> {
        let (burst, period) = (self.burst, self.period);
        if !self.tenants.contains_key(tenant) {
            self.forget(now);
            self.tenants.insert(tenant.into(), Bucket { tokens: burst, at: now, refused: 0 });
        }
        let bucket = self.tenants.get_mut(tenant)?;
        bucket.fill(burst, period, now);
        match bucket.tokens.checked_sub(1) {
            None => {
                bucket.refused += 1;
                None
            }
            Some(left) => {
                bucket.tokens = left;
                Some(std::mem::take(&mut bucket.refused))
            }
        }
    }

    fn forget(&mut self, now: Instant) {
        if self.tenants.len() < self.forget_at {
            return;
        }
        let (burst, period) = (self.burst, self.period);
        self.tenants.retain(|_, bucket| {
            bucket.fill(burst, period, now);
            bucket.tokens < burst
        });
        self.forget_at = (2 * self.tenants.len()).max(Self::FORGET_AT);
    }
}

impl Bucket {
    fn fill(&mut self, burst: u32, period: Duration, now: Instant) {
        while self.tokens < burst && now.saturating_duration_since(self.at) >= period {
            self.tokens += 1;
            self.at += period;
        }
        if self.tokens == burst {
            self.at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_owns_what() {
        for (object, tenant) in [
            ("Service a/s", "a"),
            ("EndpointSlice b/s-1", "b"),
            ("x.yaml, document 2 (line 3), items[0], Service a/s", "x.yaml"),
            ("Namespace a", "a"),
            ("ServiceCIDR kubernetes", ""),
            ("device eth0", ""),
            ("API server https://192.0.2.1:6443/, services", ""),
            ("--devices", ""),
            ("node", ""),
        ] {
            assert_eq!(tenant_of(object), tenant, "{object}");
        }
    }

    #[test]
    fn one_tenant_takes_nothing_from_another() {
        let (t0, period) = (Instant::now(), Duration::from_secs(10));
        let mut shares = Shares::new(3, period);
        let got =
            |shares: &mut Shares, tenant, now| (0..100).filter_map(|_| shares.take(tenant, now)).count();
        assert_eq!(got(&mut shares, "a", t0), 3);
        assert_eq!(got(&mut shares, "b", t0), 3);
        assert_eq!(got(&mut shares, "a", t0 + period - Duration::from_millis(1)), 0);
        // It is told what it has missed.
        assert_eq!(shares.take("a", t0 + period), Some(197));
        assert_eq!(shares.take("a", t0 + 3 * period), Some(0));
        assert_eq!(got(&mut shares, "a", t0 + 1000 * period), 3);
    }

    #[test]
    fn only_who_lacks_something_is_remembered() {
        let (t0, period) = (Instant::now(), Duration::from_secs(10));
        let mut shares = Shares::new(2, period);
        for number in 0..10_000_u32 {
            let now = t0 + Duration::from_secs(number.into());
            assert_eq!(shares.take(&format!("a{number}"), now), Some(0));
        }
        assert!(shares.tenants.len() <= Shares::FORGET_AT, "{}", shares.tenants.len());
    }

    #[test]
    fn work_rests_nine_times_as_long_as_it_took() {
        for (took, rest) in [(0, 1_000), (50, 1_000), (500, 4_500), (60_000, 60_000)] {
            assert_eq!(rest_after(Duration::from_millis(took)), Duration::from_millis(rest));
        }
    }
}
