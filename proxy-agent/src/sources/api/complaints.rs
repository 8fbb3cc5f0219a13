//! What goes wrong with the API server, said to people: once, with what to do, and again only if it goes on.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::{Duration, Instant};

use super::Kind;
use super::follow::Error;
use crate::sources::Problem;

/// How often the same complaint is logged.
const REPEAT: Duration = Duration::from_secs(60);

/// How long watches of a kind may fail before that is a problem: kube-proxy's sync period by default.
const LONG: Duration = Duration::from_secs(30);

/// Failures that are further apart have nothing to do with each other: what fails is tried again sooner.
const APART: Duration = Duration::from_secs(120);

/// What is wrong at present.
pub(super) struct Complaints {
    url: String,
    /// Reason and time of the last line in the log.
    logged: BTreeMap<Kind, (String, Instant)>,
    /// Since when the watches of a kind have failed, and when they did so last.
    failing: BTreeMap<Kind, (Instant, Instant)>,
    /// Kinds whose list cannot be had, or whose changes have not been heard of for long, and why.
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

    /// An error came from the watch of `kind`, at `now`.
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

    /// The list of `kind` is complete, and something has been heard of it.
    pub(super) fn settle(&mut self, kind: Kind) {
        self.logged.remove(&kind);
        self.answered(kind);
    }

    /// The list of `kind` is complete, and its watch has said that nothing is missing.
    pub(super) fn answered(&mut self, kind: Kind) {
        self.failing.remove(&kind);
        if self.problems.remove(&kind).is_some() {
            let (resource, _) = kind.resource();
            tracing::info!(resource, server = self.url, "the API server answers again");
            self.changed = true;
        }
    }

    /// Whether the problems are others than at the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The whole list of problems.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let problem = |(kind, reason): (&Kind, &String)| Problem {
            object: format!("API server {}, {}", self.url, kind.resource().0),
            reason: format!("{reason}; what was known stays in force"),
        };
        self.problems.iter().map(problem).collect()
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

/// An error with what caused it; kube's errors repeat some of it.
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

/// What can be done about a failure of TLS, by the words in which the library tells of it.
fn advice(causes: &str) -> &'static str {
    const STRANGER: &str = ": the server's certificate is not of the authority that is in use (certificate-authority in the kubeconfig, \
                            ca.crt of the ServiceAccount in a pod), or the server does not send the one in between";
    let known = [
        ("UnknownIssuer", STRANGER),
        // An authority of the same name.
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
        let refused = || kube::Error::Api(Status { code: 401, ..Status::default() }.boxed());
        let start = Instant::now();
        let told = |complaints: &Complaints| {
            complaints.problems().into_iter().map(|problem| problem.reason).collect::<Vec<_>>()
        };
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
        // Without a list nothing is known.
        complaints.note(kind, &Error::List(refused()), start + Duration::from_secs(323));
        assert_eq!(told(&complaints).len(), 1);
    }
}
