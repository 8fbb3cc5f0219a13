//! Shares of the resources that all tenants of a cluster have in common: lines of the log and of `status`, Events,
//! time. Pure.
//!
//! A tenant is a namespace, or a file of manifests. Problems of the node itself belong to no tenant.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Returns the tenant of an object, which is named as problems name it: the namespace of `Service a/s`, the file of
/// `x.yaml, document 2`, or an empty string for objects of the node.
pub(crate) fn tenant_of(object: &str) -> &str {
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

/// Returns the pause after work that tenants can cause and that took `took`: nine times as long, so that the work
/// takes a tenth of the time, but at least one second and at most 60 seconds.
pub(crate) fn rest_after(took: Duration) -> Duration {
    (took * 9).clamp(Duration::from_secs(1), Duration::from_secs(60))
}

/// A bucket of tokens for each tenant.
#[derive(Debug)]
pub(crate) struct Shares {
    burst: u32,
    period: Duration,
    tenants: BTreeMap<Arc<str>, Bucket>,
    /// Number of tenants at which tenants that have all their tokens are forgotten.
    forget_at: usize,
}

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// Time at which `tokens` was correct.
    at: Instant,
    /// Number of refusals since the last token was taken.
    refused: u64,
}

impl Shares {
    const FORGET_AT: usize = 64;

    /// Gives each tenant `burst` tokens at once, and one more whenever `period` has passed.
    pub(crate) const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, tenants: BTreeMap::new(), forget_at: Self::FORGET_AT }
    }

    /// Takes a token of a tenant. Returns `None` if it has none left, else the number of refusals since its last
    /// token.
    pub(crate) fn take(&mut self, tenant: &str, now: Instant) -> Option<u64> {
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
        assert_eq!(got(&mut shares, "a", t0), 3);
        assert_eq!(got(&mut shares, "b", t0), 3);
        assert_eq!(got(&mut shares, "a", t0 + period - Duration::from_millis(1)), 0);
        // The tenant learns the number of its refusals.
        assert_eq!(shares.take("a", t0 + period), Some(197));
        assert_eq!(shares.take("a", t0 + 3 * period), Some(0));
        assert_eq!(got(&mut shares, "a", t0 + 1000 * period), 3);
    }

    fn got(shares: &mut Shares, tenant: &str, now: Instant) -> usize {
        (0..100).filter_map(|_| shares.take(tenant, now)).count()
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
