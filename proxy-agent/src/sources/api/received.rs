//! Objects as received from the API server. An invalid object must not make the list that contains it unusable.

use std::borrow::Cow;
use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

/// A received object, valid or not.
#[derive(Clone, Debug)]
pub(super) enum Received<K> {
    /// Valid object.
    Object(K),
    /// JSON that is not a valid object of the kind.
    Nonsense(Box<Nonsense>),
}

/// Identity and defect of an invalid object.
#[derive(Clone, Debug)]
pub(super) struct Nonsense {
    /// Namespace, name and resourceVersion, as far as the object has them.
    meta: ObjectMeta,
    /// Field or position of the defect, and its description.
    pub(super) reason: String,
}

impl Nonsense {
    fn new<K: DeserializeOwned>(text: &str, error: &serde_json::Error) -> Self {
        let object: Value = serde_json::from_str(text).unwrap_or_default();
        let [namespace, name, resource_version] = ["namespace", "name", "resourceVersion"]
            .map(|field| object["metadata"][field].as_str().map(str::to_owned));
        let meta = ObjectMeta { namespace, name, resource_version, ..ObjectMeta::default() };
        // The second attempt gives the path of the field.
        let told = serde_path_to_error::deserialize::<_, K>(&mut serde_json::Deserializer::from_str(text));
        Self { meta, reason: told.map_or_else(|told| told.to_string(), |_| error.to_string()) }
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Received<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The raw text is taken first, because the end of an invalid object must be known. Nothing is copied: kube
        // reads from memory.
        let text = <&RawValue>::deserialize(deserializer)?.get();
        Ok(match serde_json::from_str(text) {
            Ok(object) => Self::Object(object),
            Err(error) => Self::Nonsense(Box::new(Nonsense::new::<K>(text, &error))),
        })
    }
}

/// Same group, version, kind and plural as those of the object.
impl<K: Resource> Resource for Received<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Object(object) => object.meta(),
            Self::Nonsense(nonsense) => &nonsense.meta,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Object(object) => object.meta_mut(),
            Self::Nonsense(nonsense) => &mut nonsense.meta,
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt as _;
    use kube::api::{ObjectList, WatchEvent};

    use super::*;
    use crate::sources::objects::Service;

    const GOOD: &str = r#"{"metadata":{"name":"good","resourceVersion":"1"},"spec":{"ports":[{"port":80}]}}"#;
    const BAD: &str = r#"{"metadata":{"namespace":"a","name":"bad","resourceVersion":"2","creationTimestamp":7},"spec":{"ports":"none"}}"#;

    fn describe(received: &Received<Service>) -> String {
        let verdict = match received {
            Received::Object(_) => "fine",
            Received::Nonsense(nonsense) => &nonsense.reason,
        };
        format!("{} {:?}: {verdict}", received.name_any(), received.resource_version())
    }

    #[test]
    fn nonsense_costs_itself() {
        let list = format!(r#"{{"metadata":{{"resourceVersion":"3"}},"items":[{GOOD},{BAD},[],{GOOD}]}}"#);
        let list: ObjectList<Received<Service>> = serde_json::from_str(&list).unwrap();
        let all: Vec<String> = list.items.iter().map(describe).collect();
        assert_eq!((&all[0], &all[3]), (&r#"good Some("1"): fine"#.to_owned(), &all[0]));
        assert!(
            all[1].starts_with(r#"bad Some("2"): metadata.creationTimestamp: invalid type: integer `7`"#),
            "{all:?}"
        );
        assert!(all[2].starts_with(" None: "), "{all:?}");
    }

    #[test]
    fn events_hold_them_too() {
        assert_eq!(added(GOOD), r#"good Some("1"): fine"#);
        assert!(added(BAD).starts_with(r#"bad Some("2"): "#));
        assert!(added("null").starts_with(" None: "));
    }

    fn added(object: &str) -> String {
        let event = format!(r#"{{"type":"ADDED","object":{object}}}"#);
        match serde_json::from_str::<WatchEvent<Received<Service>>>(&event) {
            Ok(WatchEvent::Added(received)) => describe(&received),
            other => panic!("{other:?}"),
        }
    }
}
