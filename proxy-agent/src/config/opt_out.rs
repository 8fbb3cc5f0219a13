//! The rules of `--socket-opt-out`.

use std::collections::{BTreeMap, BTreeSet};

/// Annotation of a Pod whose sockets are left alone if the value is [`OFF`].
pub const ANNOTATION: &str = "vipr.dev/socket-edge";
const OFF: &str = "off";
const RUNTIME_CLASS: &str = "runtime-class=";
const CGROUP: &str = "cgroup=";

/// Rules for the Pods and cgroups that opt out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    annotation: bool,
    runtime_classes: BTreeSet<String>,
    cgroups: BTreeSet<String>,
}

/// A rule of an unknown form.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--socket-opt-out `{0}`: must be `annotation`, `runtime-class=NAME` or `cgroup=PATH` (below the root of the hierarchy, without \
     `.` and `..`), several separated by commas"
)]
pub struct RuleError(String);

impl Rules {
    /// Parses the parts of the flag.
    ///
    /// # Errors
    ///
    /// [`RuleError`] names the invalid part.
    pub fn parse(parts: &[String]) -> Result<Self, RuleError> {
        let mut rules = Self::default();
        for part in parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()) {
            let wrong = || RuleError(part.to_owned());
            if part == "annotation" {
                rules.annotation = true;
            } else if let Some(path) = part.strip_prefix(CGROUP) {
                rules.cgroups.insert(relative(path).ok_or_else(wrong)?);
            } else {
                let name = part.strip_prefix(RUNTIME_CLASS).filter(|name| !name.is_empty());
                rules.runtime_classes.insert(name.ok_or_else(wrong)?.to_owned());
            }
        }
        Ok(rules)
    }

    /// Returns whether no rule is about Pods, so that Pods need not be known.
    pub(crate) fn is_empty(&self) -> bool {
        !self.annotation && self.runtime_classes.is_empty()
    }

    /// Returns the cgroups that opt out, by their paths below the root.
    pub(crate) fn cgroups(&self) -> &BTreeSet<String> {
        &self.cgroups
    }

    /// Returns whether a Pod with these annotations and this runtime class opts out.
    pub(crate) fn hold(
        &self,
        annotations: Option<&BTreeMap<String, String>>,
        runtime_class: Option<&str>,
    ) -> bool {
        let annotated = annotations.and_then(|all| all.get(ANNOTATION)).is_some_and(|value| value == OFF);
        let sandboxed = runtime_class.is_some_and(|class| self.runtime_classes.contains(class));
        self.annotation && annotated || sandboxed
    }
}

/// Normalizes a path below the root of the hierarchy. Returns `None` for the root itself, and for a path that may
/// lead out of the hierarchy.
fn relative(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let leads_there = !parts.is_empty() && parts.iter().all(|part| !matches!(*part, "." | ".."));
    leads_there.then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        for (rules, annotation, class, opts_out) in [
            ("", "off", "gvisor", false),
            ("annotation", "off", "", true),
            ("annotation", "on", "gvisor", false),
            ("runtime-class=gvisor", "off", "", false),
            ("runtime-class=gvisor, runtime-class=kata", "", "kata", true),
            ("annotation,runtime-class=gvisor", "", "kata", false),
            ("annotation,runtime-class=gvisor", "on", "gvisor", true),
        ] {
            let parsed = parse(rules).unwrap();
            assert_eq!(parsed.is_empty(), rules.is_empty());
            let annotations = BTreeMap::from([(ANNOTATION.to_owned(), annotation.to_owned())]);
            assert_eq!(parsed.hold(Some(&annotations), Some(class)), opts_out, "{rules}");
            assert!(!parsed.hold(None, None));
        }
        for wrong in [
            "annotations",
            "annotation,runtime-class=",
            "runtime-class",
            "gvisor",
            "cgroup",
            "cgroup=",
            "cgroup=/",
            "cgroup=..",
            "cgroup=a/../..",
            "annotation,cgroup=./a",
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(
                error.starts_with("--socket-opt-out `") && error.contains("must be `annotation`"),
                "{error}"
            );
        }
    }

    fn parse(text: &str) -> Result<Rules, RuleError> {
        Rules::parse(&text.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn cgroups_by_their_paths() {
        let rules =
            ["cgroup=system.slice/docker", " cgroup=//machine.slice// ", "cgroup=/a b"].map(str::to_owned);
        let rules = Rules::parse(&rules).unwrap();
        assert!(rules.cgroups().iter().eq(["a b", "machine.slice", "system.slice/docker"]));
        assert!(rules.is_empty() && !rules.hold(None, None), "they are no Pods");
    }
}
