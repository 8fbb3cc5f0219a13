//! Access control as in RBAC: the rules of a ClusterRole for requests with one bearer token.

use hyper::HeaderMap;
use hyper::header;
use k8s_openapi::api::rbac::v1::PolicyRule;

use super::status::Status;
use super::{ApiServer, Resource, Verb};

/// The rules, if there are any.
#[derive(Debug, Default)]
pub(super) struct Access(Option<Restriction>);

#[derive(Debug)]
struct Restriction {
    token: String,
    rules: Vec<PolicyRule>,
}

impl Access {
    /// Checks whether a request is allowed; otherwise returns kube-apiserver's answer to it.
    pub(super) fn judge(&self, headers: &HeaderMap, verb: Verb, resource: Resource) -> Result<(), Status> {
        let Some(Restriction { token, rules }) = &self.0 else { return Ok(()) };
        let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if sent.and_then(|value| value.strip_prefix("Bearer ")) != Some(token) {
            return Err(Status::new(401, "Unauthorized"));
        }
        if rules.iter().any(|rule| allows(rule, verb, resource)) {
            return Ok(());
        }
        let (verb, plural, group) = (verb.name(), resource.plural(), resource.group());
        Err(Status::new(
            403,
            format!("{plural} is forbidden: cannot {verb} resource \"{plural}\" in API group \"{group}\""),
        ))
    }
}

/// Returns whether a rule of a ClusterRole without resource names grants a verb.
pub fn allows(rule: &PolicyRule, verb: Verb, resource: Resource) -> bool {
    let names =
        |list: &Option<Vec<String>>, name: &str| list.iter().flatten().any(|one| one == name || one == "*");
    rule.resource_names.is_none()
        && names(&rule.api_groups, resource.group())
        && names(&rule.resources, resource.plural())
        && rule.verbs.iter().any(|one| one == verb.name() || one == "*")
}

impl ApiServer {
    /// Restricts the server to requests that have this bearer token and that one of the rules grants: others get 401 or
    /// 403. All requests are counted.
    pub fn restrict(&self, token: &str, rules: &[PolicyRule]) {
        let restriction = Restriction { token: token.to_owned(), rules: rules.to_vec() };
        self.shared.state().access = Access(Some(restriction));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(access: &Access, token: &str, verb: Verb, resource: Resource) -> Option<u16> {
        let headers = HeaderMap::from_iter([(
            header::AUTHORIZATION,
            format!("Bearer {token}").parse().expect("a header value"),
        )]);
        let refused = access.judge(&headers, verb, resource).err()?;
        refused.to_value()["code"].as_u64().and_then(|code| u16::try_from(code).ok())
    }

    #[test]
    fn only_what_a_rule_grants_is_allowed() {
        let rules = vec![rule("", "services", &["list"]), rule("events.k8s.io", "events", &["*"])];
        let access = Access(Some(Restriction { token: "t".to_owned(), rules }));
        for (token, verb, resource, want) in [
            ("t", Verb::List, Resource::Services, None),
            ("t", Verb::Watch, Resource::Services, Some(403)),
            ("t", Verb::List, Resource::Nodes, Some(403)),
            ("t", Verb::Create, Resource::Events, None),
            ("t", Verb::Create, Resource::CoreEvents, Some(403)),
            ("u", Verb::List, Resource::Services, Some(401)),
        ] {
            assert_eq!(code(&access, token, verb, resource), want, "{token} {verb:?} {resource}");
        }
        assert_eq!(code(&Access::default(), "", Verb::Delete, Resource::Nodes), None);
    }

    fn rule(group: &str, resource: &str, verbs: &[&str]) -> PolicyRule {
        PolicyRule {
            api_groups: Some(vec![group.to_owned()]),
            resources: Some(vec![resource.to_owned()]),
            verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
            ..PolicyRule::default()
        }
    }
}
