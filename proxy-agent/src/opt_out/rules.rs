//! `--socket-opt-out`.

use std::collections::{BTreeMap, BTreeSet};

/// The annotation of a Pod that leaves its sockets alone if it is [`OFF`].
pub const ANNOTATION: &str = "vipr.dev/socket-edge";
const OFF: &str = "off";
const RUNTIME_CLASS: &str = "runtime-class=";

/// Which Pods opt out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    annotation: bool,
    runtime_classes: BTreeSet<String>,
}

/// A rule that there is not.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--socket-opt-out `{0}`: must be `annotation` or `runtime-class=NAME`, several separated by commas")]
pub struct RuleError(String);

impl Rules {
    /// From the parts of the flag.
    ///
    /// # Errors
    ///
    /// [`RuleError`] names the part.
    pub fn parse(parts: &[String]) -> Result<Self, RuleError> {
        let mut rules = Self::default();
        for part in parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()) {
            match part.strip_prefix(RUNTIME_CLASS) {
                Some(name) if !name.is_empty() => {
                    rules.runtime_classes.insert(name.to_owned());
                }
                None if part == "annotation" => rules.annotation = true,
                _ => return Err(RuleError(part.to_owned())),
            }
        }
        Ok(rules)
    }

    /// Nobody opts out: Pods need not be known.
    pub fn is_empty(&self) -> bool {
        !self.annotation && self.runtime_classes.is_empty()
    }

    /// Whether a Pod with these annotations and this runtime class does.
    pub fn hold(&self, annotations: Option<&BTreeMap<String, String>>, runtime_class: Option<&str>) -> bool {
        let annotated = || annotations?.get(ANNOTATION).map(|value| value == OFF);
        let sandboxed = || runtime_class.map(|class| self.runtime_classes.contains(class));
        self.annotation && annotated().unwrap_or(false) || sandboxed().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let parse = |text: &str| Rules::parse(&text.split(',').map(str::to_owned).collect::<Vec<_>>());
        let annotations = |value: &str| BTreeMap::from([(ANNOTATION.to_owned(), value.to_owned())]);
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
            assert_eq!(parsed.hold(Some(&annotations(annotation)), Some(class)), opts_out, "{rules}");
            assert!(!parsed.hold(None, None));
        }
        for wrong in ["annotations", "annotation,runtime-class=", "runtime-class", "gvisor"] {
            assert!(parse(wrong).unwrap_err().to_string().contains("must be `annotation` or"), "{wrong}");
        }
    }
}
