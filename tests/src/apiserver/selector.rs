//! Label and field selectors, as the API defines them.
//!
//! `!=`, `notin` and `!key` are true of an object without the label. A field that an object does not have is the
//! empty string.

use std::collections::BTreeMap;

use super::object::Object;
use super::resource::Resource;
use super::status::Status;

/// Restriction of a list or watch.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) namespace: Option<String>,
    labels: Vec<Label>,
    fields: Vec<Field>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Label {
    Exists(String),
    Absent(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    key: String,
    equal: bool,
    value: String,
}

impl Selection {
    /// Parses the query parameters `labelSelector` and `fieldSelector`.
    pub(super) fn parse(
        resource: Resource,
        namespace: Option<String>,
        labels: &str,
        fields: &str,
    ) -> Result<Self, Status> {
        let fields = parse_fields(fields)?;
        if let Some(field) = fields.iter().find(|field| !resource.has_field(&field.key)) {
            return Err(Status::new(400, format!("field label not supported: {}", field.key)));
        }
        Ok(Self { namespace, labels: parse_labels(labels)?, fields })
    }

    /// Returns whether the selection restricts more than the namespace.
    pub(super) fn selects(&self) -> bool {
        !self.labels.is_empty() || !self.fields.is_empty()
    }

    pub(super) fn matches(&self, object: &Object) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| *namespace == object.key.namespace)
            && self.labels.iter().all(|label| label.matches(&object.labels))
            && self.fields.iter().all(|field| (object.field(&field.key) == field.value) == field.equal)
    }
}

impl Label {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Exists(key) => labels.contains_key(key),
            Self::Absent(key) => !labels.contains_key(key),
            Self::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
        }
    }
}

fn parse_labels(text: &str) -> Result<Vec<Label>, Status> {
    split_outside_parentheses(text)
        .into_iter()
        .map(|part| {
            parse_label(part.trim()).ok_or_else(|| {
                Status::new(
                    400,
                    format!("unable to parse requirement: \"{part}\" in label selector \"{text}\""),
                )
            })
        })
        .collect()
}

fn parse_label(part: &str) -> Option<Label> {
    if let Some(key) = part.strip_prefix('!') {
        return Some(Label::Absent(label_key(key)?));
    }
    if let Some(list) = part.strip_suffix(')') {
        let (head, values) = list.split_once('(')?;
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        let key = label_key(words.next()?)?;
        return match (words.next()?, words.next()) {
            ("in", None) => Some(Label::In(key, values)),
            ("notin", None) => Some(Label::NotIn(key, values)),
            _ => None,
        };
    }
    if let Some((key, value)) = part.split_once("!=") {
        return Some(Label::NotIn(label_key(key)?, vec![value.trim().to_owned()]));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Some(Label::In(label_key(key)?, vec![value.trim().to_owned()]));
    }
    Some(Label::Exists(label_key(part)?))
}

fn label_key(text: &str) -> Option<String> {
    let key = text.trim();
    (!key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')))
        .then(|| key.to_owned())
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut inside = false;
    if text.is_empty() {
        return Vec::new();
    }
    text.split(|c| {
        match c {
            '(' => inside = true,
            ')' => inside = false,
            _ => {}
        }
        c == ',' && !inside
    })
    .collect()
}

fn parse_fields(text: &str) -> Result<Vec<Field>, Status> {
    let mut fields = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (key, equal, value) = if let Some((key, value)) = part.split_once("!=") {
            (key, false, value)
        } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (key, true, value)
        } else {
            return Err(invalid(text, part));
        };
        if value.contains(['=', '\\']) {
            return Err(invalid(text, part));
        }
        fields.push(Field { key: key.to_owned(), equal, value: value.to_owned() });
    }
    Ok(fields)
}

fn invalid(text: &str, part: &str) -> Status {
    Status::new(400, format!("invalid field selector: \"{text}\"; can't understand \"{part}\""))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(labels: &str, fields: &str, want: bool) {
        let service = json!({
            "metadata": { "namespace": "shop", "name": "cart", "labels": { "app": "cart", "empty": "" } },
            "spec": { "clusterIP": "None", "type": "ClusterIP" },
        });
        let object = Object::new(Resource::Services, service, 7).unwrap();
        let selection = Selection::parse(Resource::Services, None, labels, fields).unwrap();
        assert_eq!(selection.matches(&object), want, "labels {labels:?}, fields {fields:?}");
    }

    #[test]
    fn label_selectors() {
        for (selector, want) in [
            ("", true),
            ("app", true),
            ("!app", false),
            ("other", false),
            ("!other", true),
            ("app=cart", true),
            ("app==cart", true),
            ("app = cart", true),
            ("app=shop", false),
            ("app!=cart", false),
            ("app!=shop", true),
            ("other!=shop", true),
            ("empty=", true),
            ("app in (cart, shop)", true),
            ("app in (shop)", false),
            ("other in (shop)", false),
            ("app notin (shop,x)", true),
            ("app notin (cart)", false),
            ("other notin (cart)", true),
            ("app,!other,app in (a,cart)", true),
            ("app,!other,app in (a,b)", false),
        ] {
            check(selector, "", want);
        }
    }

    #[test]
    fn field_selectors() {
        for (selector, want) in [
            ("metadata.name=cart", true),
            ("metadata.name!=cart", false),
            ("metadata.namespace=shop,metadata.name==cart", true),
            ("metadata.namespace=default", false),
            ("spec.clusterIP=None", true),
            ("spec.clusterIP!=None", false),
            ("spec.type!=ExternalName", true),
        ] {
            check("", selector, want);
        }
    }

    #[test]
    fn what_the_api_refuses_is_refused() {
        for labels in ["=x", "app in cart", "app in (cart", "app, ,x", "a b"] {
            assert!(Selection::parse(Resource::Services, None, labels, "").is_err(), "{labels:?}");
        }
        for fields in ["metadata.name", "spec.replicas=1", "metadata.name=a=b"] {
            assert!(Selection::parse(Resource::Services, None, "", fields).is_err(), "{fields:?}");
        }
        assert!(Selection::parse(Resource::Nodes, None, "", "metadata.namespace=x").is_err());
    }
}
