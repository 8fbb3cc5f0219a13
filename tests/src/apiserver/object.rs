//! One stored object: the fields that selectors read, and its JSON, serialised once.
//!
//! The JSON is kept without `kind` and `apiVersion`, which the items of a list do not have; for every other use they
//! are put in front.

use std::collections::BTreeMap;

use axum::body::Bytes;
use serde_json::{Map, Value, json};

use super::resource::Resource;

/// Namespace (empty for cluster-scoped resources) and name; ordered as in lists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Key {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Returns the key that an object's metadata names.
    pub(super) fn of(resource: Resource, object: &Value) -> Result<Self, String> {
        let [namespace, name] =
            ["namespace", "name"].map(|field| object["metadata"][field].as_str().unwrap_or_default());
        if name.is_empty() {
            return Err(format!("{}: metadata.name is missing", resource.kind()));
        }
        if resource.namespaced() == namespace.is_empty() {
            let must = if resource.namespaced() { "is missing" } else { "is set on a cluster-scoped object" };
            return Err(format!("{} {name}: metadata.namespace {must}", resource.kind()));
        }
        Ok(Self::new(namespace, name))
    }
}

/// An object at one revision.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) key: Key,
    pub(super) revision: u64,
    pub(super) labels: BTreeMap<String, String>,
    fields: BTreeMap<&'static str, String>,
    body: Bytes,
}

impl Object {
    /// Stores `value` at `revision`, which becomes its resourceVersion.
    pub(super) fn new(resource: Resource, mut value: Value, revision: u64) -> Result<Self, String> {
        let key = Key::of(resource, &value)?;
        value["metadata"]["resourceVersion"] = Value::String(revision.to_string());
        let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
        let labels = labels.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect();
        let fields = ["spec.clusterIP", "spec.type", "spec.nodeName", "status.phase", "status.podIP"]
            .into_iter()
            .filter(|field| resource.has_field(field))
            .filter_map(|field| {
                let (part, name) = field.split_once('.')?;
                Some((field, value[part][name].as_str()?.to_owned()))
            })
            .collect();
        if let Value::Object(map) = &mut value {
            map.remove("kind");
            map.remove("apiVersion");
        }
        Ok(Self { key, revision, labels, fields, body: Bytes::from(value.to_string()) })
    }

    /// Returns the value of a field that selectors know; empty if the object does not have it.
    pub(super) fn field(&self, key: &str) -> &str {
        match key {
            "metadata.name" => &self.key.name,
            "metadata.namespace" => &self.key.namespace,
            _ => self.fields.get(key).map_or("", String::as_str),
        }
    }

    /// Returns the JSON of the object as an item of a list.
    pub(super) fn as_item(&self) -> &[u8] {
        &self.body
    }

    /// Appends the object as a document, with `kind` and `apiVersion`, to `out`.
    pub(super) fn write(&self, resource: Resource, out: &mut Vec<u8>) {
        let head = format!(r#"{{"kind":"{}","apiVersion":"{}","#, resource.kind(), resource.api_version());
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.body.get(1..).unwrap_or_default());
    }

    /// Returns the object as a value, with `kind` and `apiVersion`.
    pub(super) fn to_value(&self, resource: Resource) -> Value {
        let mut value: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["kind"] = json!(resource.kind());
        value["apiVersion"] = json!(resource.api_version());
        value
    }
}

/// Applies a JSON merge patch (RFC 7386): null removes a field, objects are merged, any other value replaces.
pub(super) fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (key, value) in patch {
        if value.is_null() {
            if let Value::Object(target) = target {
                target.remove(key);
            }
        } else {
            merge_patch(&mut target[key.as_str()], value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_patch_as_in_the_rfc() {
        for (target, patch, want) in [
            (json!({ "a": "b" }), json!({ "a": "c" }), json!({ "a": "c" })),
            (json!({ "a": "b" }), json!({ "b": "c" }), json!({ "a": "b", "b": "c" })),
            (json!({ "a": "b", "b": "c" }), json!({ "a": null }), json!({ "b": "c" })),
            (json!({ "a": [1, 2] }), json!({ "a": [3] }), json!({ "a": [3] })),
            (json!({ "a": { "b": 1, "c": 2 } }), json!({ "a": { "b": null } }), json!({ "a": { "c": 2 } })),
            (json!({ "a": 1 }), json!({ "a": { "b": { "c": null } } }), json!({ "a": { "b": {} } })),
        ] {
            let mut got = target.clone();
            merge_patch(&mut got, &patch);
            assert_eq!(got, want, "{target} patched with {patch}");
        }
    }

    #[test]
    fn a_document_round_trips() {
        let slice = json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "metadata": { "namespace": "a", "name": "b", "resourceVersion": "5" }, "endpoints": [],
        });
        let object = Object::new(Resource::EndpointSlices, slice.clone(), 5).unwrap();
        assert_eq!(object.to_value(Resource::EndpointSlices), slice);
        let mut document = Vec::new();
        object.write(Resource::EndpointSlices, &mut document);
        assert_eq!(serde_json::from_slice::<Value>(&document).unwrap(), slice);
    }
}
