//! POST, PUT, PATCH and DELETE.
//!
//! As on a real server, a write to an object does not change its status, and a write to the subresource `status`
//! changes only the status. A server-side apply is treated as a merge patch that may create: field ownership is not
//! tracked.

use axum::body::Body;
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::http::{document, respond};
use super::object::{Key, merge_patch};
use super::resource::{Resource, Verb};
use super::status::Status;
use super::store::Store;

/// One write request.
pub(super) struct Write<'a> {
    pub(super) resource: Resource,
    /// Key in the path; the name is empty for a creation.
    pub(super) key: Key,
    pub(super) status_only: bool,
    pub(super) content_type: &'a str,
    pub(super) body: &'a [u8],
}

pub(super) fn write(store: &mut Store, verb: Verb, write: Write<'_>) -> Result<Response<Body>, Status> {
    match verb {
        Verb::Create => create(store, write),
        Verb::Update => update(store, write),
        Verb::Patch => patch(store, write),
        Verb::Delete => delete(store, &write),
        Verb::Get | Verb::List | Verb::Watch => Err(Status::new(405, "not a write")),
    }
}

impl Write<'_> {
    fn parse(&self) -> Result<Value, Status> {
        let value: Value = serde_json::from_slice(self.body)
            .map_err(|error| Status::new(400, format!("the body is not JSON: {error}")))?;
        if value.is_object() { Ok(value) } else { Err(Status::new(400, "the body is not a JSON object")) }
    }

    /// Checks that the object is the one that the path names, and fills in the fields that it may leave out.
    fn complete(&self, value: &mut Value) -> Result<(), Status> {
        let (kind, api_version) = (self.resource.kind(), self.resource.api_version());
        for (field, want) in [("kind", kind), ("apiVersion", api_version.as_str())] {
            match value[field].as_str() {
                None => value[field] = json!(want),
                Some(got) if got == want => {}
                Some(got) => return Err(Status::new(400, format!("{field} is {got}, the path says {want}"))),
            }
        }
        if !value["metadata"].is_object() {
            value["metadata"] = json!({});
        }
        for (field, want) in [("namespace", &self.key.namespace), ("name", &self.key.name)] {
            match value["metadata"][field].as_str() {
                _ if want.is_empty() => {}
                None | Some("") => value["metadata"][field] = json!(want),
                Some(got) if got == want => {}
                Some(got) => {
                    return Err(Status::new(400, format!("metadata.{field} is {got}, the path says {want}")));
                }
            }
        }
        Ok(())
    }
}

fn create(store: &mut Store, mut write: Write<'_>) -> Result<Response<Body>, Status> {
    let mut value = write.parse()?;
    let metadata = &value["metadata"];
    let name = match (metadata["name"].as_str(), metadata["generateName"].as_str()) {
        (Some(name), _) if !name.is_empty() => name.to_owned(),
        (_, Some(prefix)) => format!("{prefix}{:05}", store.revision() + 1),
        _ => return Err(Status::new(422, "metadata.name: Required value: name or generateName is required")),
    };
    value["metadata"]["name"] = json!(name);
    write.key.name = name;
    insert(store, &write, value)
}

fn insert(store: &mut Store, write: &Write<'_>, mut value: Value) -> Result<Response<Body>, Status> {
    write.complete(&mut value)?;
    if !value["metadata"]["resourceVersion"].as_str().unwrap_or_default().is_empty() {
        return Err(Status::new(400, "resourceVersion should not be set on objects to be created"));
    }
    // A node registers with its status; other objects get their status from a controller.
    if write.resource.has_status()
        && write.resource != Resource::Nodes
        && let Value::Object(map) = &mut value
    {
        map.remove("status");
    }
    if let Value::Object(metadata) = &mut value["metadata"] {
        metadata.remove("uid");
    }
    if store.get(write.resource, &write.key).is_some() {
        return Err(Status::already_exists(write.resource, &write.key));
    }
    put(store, write, value, StatusCode::CREATED)
}

fn update(store: &mut Store, write: Write<'_>) -> Result<Response<Body>, Status> {
    let value = write.parse()?;
    let old = existing(store, &write)?;
    replace(store, &write, &old, value)
}

fn patch(store: &mut Store, write: Write<'_>) -> Result<Response<Body>, Status> {
    let apply = match write.content_type {
        "application/merge-patch+json" => false,
        "application/apply-patch+yaml" => true,
        other => return Err(Status::new(415, format!("the patch type {other} is not supported"))),
    };
    let change = write.parse()?;
    if apply && !write.status_only && store.get(write.resource, &write.key).is_none() {
        return insert(store, &write, change);
    }
    let old = existing(store, &write)?;
    let mut value = old.clone();
    merge_patch(&mut value, &change);
    replace(store, &write, &old, value)
}

fn existing(store: &mut Store, write: &Write<'_>) -> Result<Value, Status> {
    let object = store.get(write.resource, &write.key);
    let object = object.ok_or_else(|| Status::not_found(write.resource, &write.key))?;
    Ok(object.to_value(write.resource))
}

fn replace(
    store: &mut Store,
    write: &Write<'_>,
    old: &Value,
    mut value: Value,
) -> Result<Response<Body>, Status> {
    write.complete(&mut value)?;
    let version = &value["metadata"]["resourceVersion"];
    if version.as_str().is_some_and(|version| !version.is_empty())
        && *version != old["metadata"]["resourceVersion"]
    {
        return Err(Status::conflict(write.resource, &write.key));
    }
    let mut new = if write.status_only { old.clone() } else { value.clone() };
    if write.resource.has_status() {
        let status = if write.status_only { &value["status"] } else { &old["status"] };
        set_or_remove(&mut new, "status", status);
    }
    for field in ["uid", "creationTimestamp"] {
        set_or_remove(&mut new["metadata"], field, &old["metadata"][field]);
    }
    put(store, write, new, StatusCode::OK)
}

fn set_or_remove(value: &mut Value, field: &str, to: &Value) {
    if let Value::Object(map) = value {
        if to.is_null() {
            map.remove(field);
        } else {
            map.insert(field.to_owned(), to.clone());
        }
    }
}

fn put(
    store: &mut Store,
    write: &Write<'_>,
    value: Value,
    status: StatusCode,
) -> Result<Response<Body>, Status> {
    let object = store.put(write.resource, value, true).map_err(|problem| Status::new(422, problem))?;
    Ok(document(status, write.resource, &object))
}

fn delete(store: &mut Store, write: &Write<'_>) -> Result<Response<Body>, Status> {
    let object = store
        .delete(write.resource, &write.key, true)
        .ok_or_else(|| Status::not_found(write.resource, &write.key))?;
    let uid = &object.to_value(write.resource)["metadata"]["uid"];
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": { "name": write.key.name, "kind": write.resource.plural(), "uid": uid },
    });
    Ok(respond(StatusCode::OK, Body::from(status.to_string())))
}
