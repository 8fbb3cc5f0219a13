//! Tables: objects as they are written, and what comes of them.

use serde_json::{Value, json};

use super::super::file::Kind;
use super::super::object::{Object, convert};
use super::*;
use crate::sources::convert::Converter;

mod addresses;
mod silences;
mod slices;

/// An object on the node `n1`, and what was said of it.
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

/// Service a/`name` with these fields of its spec.
fn service(name: &str, spec: &Value) -> Value {
    json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": name, "namespace": "a"}, "spec": spec})
}
