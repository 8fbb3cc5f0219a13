//! Tests by tables: objects as written, and the results.

use serde_json::{Value, json};

use super::super::object::{Object, convert};
use super::*;
use crate::sources::convert::Converter;
use crate::sources::manifests::id::Kind;
use crate::sources::manifests::parts::ServicePart;

mod addresses;
mod silences;
mod slices;

/// Returns an object converted on the node `n1`, and the sentences about it.
fn object(value: Value) -> (Object, Vec<String>) {
    let kind = Kind::ALL.into_iter().find(|kind| value["kind"] == kind.name()).unwrap();
    let converted = convert(kind, value, "", &mut Converter::new("n1")).unwrap();
    let object = Object { changes: converted.changes, part: converted.part, place: String::new() };
    (object, converted.said)
}

fn service_part(object: &Object) -> &ServicePart {
    let Some(Part::Service(part)) = &object.part else { panic!("{object:?}") };
    part
}

/// Returns Service a/`name` with these fields of its spec.
fn service(name: &str, spec: &Value) -> Value {
    json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": name, "namespace": "a"}, "spec": spec})
}
