//! Messages to people about failures of the API server. Each is logged once, with advice, and repeated only if the
//! failure lasts.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::{Duration, Instant};

use super::follow::Error;
use super::kind::Kind;
use crate::sources::update::Problem;

/// Interval at which the same complaint is logged again.
const REPEAT: Duration = Duration::from_secs(60);

/// Time for which watches of a kind may fail before that is a problem: kube-proxy's default sync period.
const LONG: Duration = Duration::from_secs(30);

/// Time between two failures from which on they are unrelated: a failed request is tried again sooner.
const APART: Duration = Duration::from_secs(120);

/// Present failures of the API server.
pub(super) struct Complaints {
    url: String,
    /// Reason and time of the last line in the log.
    logged: BTreeMap<Kind, (String, Instant)>,
    /// Times of the first and the last failure of a kind.
    failing: BTreeMap<Kind, (Instant, Instant)>,
    /// Kinds whose list cannot be read or whose changes have not arrived for long, with the reason.
    problems: BTreeMap<Kind, String>,
    changed: bool,
}

impl Complaints {
    pub(super) fn new(url: String) -> Self {
        Self {
            url,
            logged: BTreeMap::new(),
            failing: BTreeMap::new(),
            problems: BTreeMap::new(),
            changed: false,
        }
    }

    /// Handles an error from the watch of `kind` at `now`.
    pub(super) fn note(&mut self, kind: Kind, error: &Error, now: Instant) {
        let (resource, _) = kind.resource();
        if error.code() == Some(410) {
            tracing::debug!(resource, "the API server has forgotten where we were; listing again");
            return;
        }
        let reason = self.explain(kind, error);
        let is_new = match self.logged.get(&kind) {
            Some((last, at)) => *last != reason || now.saturating_duration_since(*at) >= REPEAT,
            None => true,
        };
        if is_new {
            self.logged.insert(kind, (reason.clone(), now));
        }
        let not_served = kind.is_optional() && error.code() == Some(404);
        match (is_new, not_served) {
            (false, _) => tracing::debug!(resource, reason, "still the same"),
            (true, true) => tracing::info!(resource, "{reason}"),
            (true, false) => tracing::warn!(resource, server = self.url, "{reason}"),
        }
        let (since, last) = self.failing.entry(kind).or_insert((now, now));
        if now.saturating_duration_since(*last) > APART {
            *since = now;
        }
        *last = now;
        let since = *since;
        if (error.is_of_list() || now.saturating_duration_since(since) >= LONG) && !not_served {
            self.changed |= self.problems.insert(kind, reason.clone()).as_ref() != Some(&reason);
        }
    }

    /// Notes that the list of `kind` is complete and an event has arrived.
    pub(super) fn settle(&mut self, kind: Kind) {
        self.logged.remove(&kind);
        self.answered(kind);
    }

    /// Notes that the list of `kind` is complete and its watch has confirmed that nothing is missing.
    pub(super) fn answered(&mut self, kind: Kind) {
        self.failing.remove(&kind);
        if self.problems.remove(&kind).is_some() {
            let (resource, _) = kind.resource();
            tracing::info!(resource, server = self.url, "the API server answers again");
            self.changed = true;
        }
    }

    /// Returns whether the problems have changed since the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns all problems.
    pub(super) fn problems(&self) -> Vec<Problem> {
        self.problems
            .iter()
            .map(|(kind, reason)| Problem {
                object: format!("API server {}, {}", self.url, kind.resource().0),
                reason: format!("{reason}; what was known stays in force"),
            })
            .collect()
    }

    fn explain(&self, kind: Kind, error: &Error) -> String {
        let (resource, group) = kind.resource();
        match error.code() {
            Some(401) => {
                "the API server does not accept our credentials: check the ServiceAccount token or the \
                          kubeconfig"
                    .to_owned()
            }
            Some(403) if kind == Kind::Pods => {
                "we may not list and watch pods (API group \"\"), which --socket-opt-out needs: add that rule to our role; \
                 no Pod opts out until then"
                    .to_owned()
            }
            Some(403) => format!(
                "we may not list and watch {resource} (API group {group:?}): bind our ServiceAccount to the \
                 ClusterRole system:node-proxier, or add that rule to its role"
            ),
            Some(404) if kind.is_optional() => {
                format!("the API server does not serve {resource}; going on without them")
            }
            Some(code) => {
                let message = error.status().map_or("", |status| &status.message);
                format!("the API server answers {code} to {resource}: {message}")
            }
            None => {
                let causes = causes(error);
                format!("cannot get {resource} from the API server: {causes}{}", advice(&causes))
            }
        }
    }
}

/// Returns an error with its causes, without repetitions: kube's errors contain some of their causes.
fn causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Returns advice about a TLS failure, found by the words of the TLS library.
fn advice(causes: &str) -> &'static str {
    const STRANGER: &str = ": the server's certificate is not of the authority that is in use (certificate-authority in the kubeconfig, \
                            ca.crt of the ServiceAccount in a pod), or the server does not send the one in between";
    let known = [
        ("UnknownIssuer", STRANGER),
        // Another authority with the same name.
        ("BadSignature", STRANGER),
        (
            "CaUsedAsEndEntity",
            ": the server shows the certificate of an authority as its own; give it one with basicConstraints CA:FALSE (also a \
             self-signed one) and name that, or its authority, as certificate-authority in the kubeconfig",
        ),
        (
            "HandshakeFailure",
            ": the server may have a key of a kind that is not known here; RSA, Ed25519 and the curves P-256 and P-384 are known, \
             P-521 is not",
        ),
    ];
    known.into_iter().find(|(word, _)| causes.contains(word)).map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn watches_that_fail_for_long_are_a_problem() {
        let (mut complaints, kind) = (Complaints::new("https://a".to_owned()), Kind::Services);
        let start = Instant::now();
        for (seconds, problems) in [(0, 0), (29, 0), (30, 1), (40, 1)] {
            complaints.note(kind, &Error::Watch(refused()), start + Duration::from_secs(seconds));
            assert_eq!(told(&complaints).len(), problems, "after {seconds} s");
        }
        assert!(told(&complaints)[0].starts_with("the API server does not accept our credentials"));
        assert!(complaints.have_changed());
        complaints.answered(kind);
        assert!(complaints.have_changed() && told(&complaints).is_empty());
        for seconds in [80, 201, 322] {
            complaints.note(kind, &Error::Watch(refused()), start + Duration::from_secs(seconds));
            assert!(told(&complaints).is_empty(), "it has worked in between");
        }
        // Without a list nothing is known, so the failure of a list is a problem at once.
        complaints.note(kind, &Error::List(refused()), start + Duration::from_secs(323));
        assert_eq!(told(&complaints).len(), 1);
    }

    fn told(complaints: &Complaints) -> Vec<String> {
        complaints.problems().into_iter().map(|problem| problem.reason).collect::<Vec<_>>()
    }

    fn refused() -> kube::Error {
        kube::Error::Api(Status { code: 401, ..Status::default() }.boxed())
    }
}
