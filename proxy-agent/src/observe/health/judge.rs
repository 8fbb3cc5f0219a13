//! Answers to the probes: pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::Family;
use serde::Serialize;

use crate::observe::probe::Probe;

/// Progress of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HealthState {
    /// State of each family, by [`Family::index`].
    families: [FamilyState; 2],
    /// Age of the oldest waiting change from which a family is unhealthy.
    pub(crate) stuck_after: Duration,
    /// Whether load balancers may send traffic to this node.
    pub(crate) node_eligible: bool,
    /// Reason why `/readyz` says no, if it does.
    pub(crate) waiting_for: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct FamilyState {
    oldest_queued: Option<Instant>,
    last_updated: Option<Timestamp>,
}

impl HealthState {
    /// Makes the state of an agent that starts: no Node seen, nothing programmed. Changes should be programmed within
    /// `sync_period`.
    pub(crate) fn new(sync_period: Duration) -> Self {
        Self {
            stuck_after: 2 * sync_period,
            families: <[FamilyState; 2]>::default(),
            node_eligible: false,
            waiting_for: Some("nothing has been programmed yet".to_owned()),
        }
    }

    /// Notes that a change waits since `now`, unless an older one does.
    pub(crate) fn queued(&mut self, family: Family, now: Instant) {
        self.of(family).oldest_queued.get_or_insert(now);
    }

    /// Notes that nothing waits any more.
    pub(crate) fn updated(&mut self, family: Family, now: Timestamp) {
        *self.of(family) = FamilyState { oldest_queued: None, last_updated: Some(now) };
    }

    /// Returns whether no judged family is stuck.
    pub(crate) fn healthy(&self, now: Instant) -> bool {
        self.families.iter().all(|family| family.healthy(now, self.stuck_after))
    }

    fn of(&mut self, family: Family) -> &mut FamilyState {
        let [v4, v6] = &mut self.families;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

impl FamilyState {
    /// Returns whether the family is not stuck. A family that was never updated is not judged: it is starting, or not
    /// in use.
    fn healthy(&self, now: Instant, stuck_after: Duration) -> bool {
        let waits = self.oldest_queued.map(|since| now.saturating_duration_since(since));
        self.last_updated.is_none() || waits.is_none_or(|waits| waits < stuck_after)
    }
}

/// Moment of an answer, on the monotonic clock and on the wall clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Monotonic time, for judgements.
    pub(crate) instant: Instant,
    /// Wall-clock time, as shown in answers.
    pub(crate) time: Timestamp,
}

/// The answer to a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Whether the status is 200 rather than 503.
    pub(crate) ok: bool,
    /// The body's Content-Type.
    pub(crate) content_type: &'static str,
    /// The body.
    pub(crate) body: String,
}

/// kube-proxy's body, with its fields in the same order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<String, FamilyBody>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: String,
    healthy: bool,
}

/// Answers a probe.
pub(crate) fn judge(state: &HealthState, probe: Probe, now: Now) -> Answer {
    let healthy = state.healthy(now.instant);
    match probe {
        Probe::Healthz => {
            let ok = healthy && state.node_eligible;
            Answer {
                ok,
                content_type: "application/json",
                body: body(state, Some(state.node_eligible), ok, now),
            }
        }
        Probe::Livez => {
            Answer { ok: healthy, content_type: "application/json", body: body(state, None, healthy, now) }
        }
        Probe::Readyz => Answer {
            ok: state.waiting_for.is_none(),
            content_type: "text/plain; charset=utf-8",
            body: match &state.waiting_for {
                Some(reason) => format!("not ready: {reason}\n"),
                None => "ok".to_owned(),
            },
        },
    }
}

fn body(state: &HealthState, node_eligible: Option<bool>, ok: bool, now: Now) -> String {
    let status = Family::ALL.into_iter().zip(&state.families).filter_map(|(family, known)| {
        let healthy = known.healthy(now.instant, state.stuck_after);
        let body = FamilyBody { last_updated: rfc3339(known.last_updated?), healthy };
        Some((family.to_string(), body))
    });
    let newest = state.families.iter().filter_map(|family| family.last_updated).max();
    let body = Body {
        // A healthy proxy counts as updated at this moment, even with nothing to do.
        last_updated: if ok { rfc3339(now.time) } else { newest.map_or_else(never, rfc3339) },
        current_time: rfc3339(now.time),
        node_eligible,
        healthy: state.healthy(now.instant),
        status: status.collect(),
    };
    // Serializing strings, booleans and a map with string keys cannot fail.
    serde_json::to_string(&body).unwrap_or_default()
}

/// Formats a time in UTC, with the fraction of a second as far as it is not zero.
fn rfc3339(time: Timestamp) -> String {
    time.to_string()
}

/// Returns kube-proxy's form of a time that has not come yet.
fn never() -> String {
    "0001-01-01T00:00:00Z".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: &str = "2026-01-01T00:00:00Z";
    const SYNC_PERIOD: Duration = Duration::from_secs(30);

    fn time(s: &str) -> Timestamp {
        s.parse().unwrap()
    }

    /// Returns the state of a node that may get traffic, with both families updated at T0.
    fn running() -> HealthState {
        let mut state = HealthState { node_eligible: true, ..HealthState::new(SYNC_PERIOD) };
        for family in Family::ALL {
            state.updated(family, time(T0));
        }
        state
    }

    fn check(state: &HealthState, now: Instant, healthz: bool, livez: bool) {
        let now = Now { instant: now, time: time("2026-01-01T00:10:00.5Z") };
        assert_eq!(judge(state, Probe::Healthz, now).ok, healthz, "healthz of {state:?}");
        assert_eq!(judge(state, Probe::Livez, now).ok, livez, "livez of {state:?}");
    }

    fn json(state: &HealthState, probe: Probe, now: Instant) -> serde_json::Value {
        let now = Now { instant: now, time: time("2026-01-01T00:10:00.5Z") };
        serde_json::from_str(&judge(state, probe, now).body).unwrap()
    }

    #[test]
    fn p198_fresh_start_is_healthy() {
        let mut fresh = HealthState::new(SYNC_PERIOD);
        let t0 = Instant::now();
        check(&fresh, t0, false, true);
        fresh.node_eligible = true;
        check(&fresh, t0, true, true);
        // Waiting for the first list is not being stuck, however long it takes.
        fresh.queued(Family::V4, t0);
        check(&fresh, t0 + 20 * SYNC_PERIOD, true, true);
        assert_eq!(json(&fresh, Probe::Livez, t0).get("status"), None);
    }

    #[test]
    fn p199_sixty_seconds_are_too_long() {
        let t0 = Instant::now();
        let mut state = running();
        state.queued(Family::V4, t0);
        check(&state, t0 + Duration::from_secs(59), true, true);
        check(&state, t0 + Duration::from_secs(60), false, false);
        // Later changes do not make the oldest younger.
        state.queued(Family::V4, t0 + Duration::from_secs(59));
        check(&state, t0 + Duration::from_secs(60), false, false);
        // An update clears all waiting changes; with nothing queued any age is fine.
        state.updated(Family::V4, time(T0));
        check(&state, t0 + Duration::from_secs(3600), true, true);
        // The clock then starts anew.
        state.queued(Family::V4, t0 + Duration::from_secs(3600));
        check(&state, t0 + Duration::from_secs(3659), true, true);
        check(&state, t0 + Duration::from_secs(3660), false, false);
    }

    #[test]
    fn p200_p202_a_node_that_is_going_away_fails_healthz_only() {
        let mut state = running();
        state.node_eligible = false;
        let now = Instant::now();
        check(&state, now, false, true);
        let healthz = json(&state, Probe::Healthz, now);
        assert_eq!((&healthz["healthy"], &healthz["nodeEligible"]), (&true.into(), &false.into()));
        assert_eq!(json(&state, Probe::Livez, now).get("nodeEligible"), None);
    }

    #[test]
    fn p201_an_eligible_node_is_fine() {
        check(&running(), Instant::now(), true, true);
    }

    #[test]
    fn p203_each_family_is_judged_by_itself() {
        let t0 = Instant::now();
        let mut state = running();
        state.queued(Family::V4, t0);
        state.queued(Family::V6, t0);
        state.updated(Family::V4, time("2026-01-01T00:01:00Z"));
        let now = t0 + Duration::from_secs(61);
        check(&state, now, false, false);
        let body = json(&state, Probe::Healthz, now);
        assert_eq!(body["status"]["IPv4"]["healthy"], true);
        assert_eq!(body["status"]["IPv6"]["healthy"], false);
        assert_eq!(body["healthy"], false);
    }

    #[test]
    fn p204_bodies_to_the_byte() {
        let instant = Instant::now();
        let now = Now { instant, time: time("2026-01-01T00:10:00.123456789Z") };
        let mut state = HealthState { node_eligible: true, ..HealthState::new(SYNC_PERIOD) };
        assert_eq!(
            judge(&state, Probe::Livez, now).body,
            r#"{"lastUpdated":"2026-01-01T00:10:00.123456789Z","currentTime":"2026-01-01T00:10:00.123456789Z","healthy":true}"#
        );
        state.node_eligible = false;
        assert_eq!(
            judge(&state, Probe::Healthz, now).body,
            r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-01-01T00:10:00.123456789Z","nodeEligible":false,"healthy":true}"#
        );
        state.updated(Family::V4, time("2026-01-01T00:00:05Z"));
        state.updated(Family::V6, time("2026-01-01T00:00:03Z"));
        assert_eq!(
            judge(&state, Probe::Healthz, now).body,
            concat!(
                r#"{"lastUpdated":"2026-01-01T00:00:05Z","currentTime":"2026-01-01T00:10:00.123456789Z","#,
                r#""nodeEligible":false,"healthy":true,"status":{"#,
                r#""IPv4":{"lastUpdated":"2026-01-01T00:00:05Z","healthy":true},"#,
                r#""IPv6":{"lastUpdated":"2026-01-01T00:00:03Z","healthy":true}}}"#
            )
        );
        assert_eq!(judge(&state, Probe::Healthz, now).content_type, "application/json");
    }
}
