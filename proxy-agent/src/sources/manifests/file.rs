//! One manifest file: documents, lists, and the objects in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use super::bytes::{Bytes, FileError};
use super::documents::{At, Document, documents};
use super::id::{DEFAULT_NAMESPACE, Id, Kind};
use super::object::{Converted, Object, convert, typed};
use crate::reconcile::cluster::ObjectKey;
use crate::sources::convert::Converter;
use crate::sources::objects::Pod;
use crate::sources::update::{Problem, outcome};

/// The objects of a file.
pub(super) type Objects = BTreeMap<Id, Object>;

/// Content of a file.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) objects: Objects,
    pub(super) problems: Vec<Problem>,
}

/// Reads the text of a file. `shown` is the file's name in problems, `before` its previous objects. A broken object
/// keeps its previous state; if a document cannot be read, all previous objects that it may hold keep theirs.
pub(super) fn read(
    path: &Path,
    text: &[u8],
    shown: &str,
    before: &Objects,
    converter: &mut Converter,
) -> Parsed {
    let mut reader = Reader { shown, before, converter, met: BTreeSet::new(), parsed: Parsed::default() };
    let mut unreadable = None;
    documents(path, text, &mut |value, at| match value {
        Ok(Document { value, said }) => {
            if let Some(said) = said {
                reader.problem(at, None, &said);
            }
            reader.document(value, at);
        }
        Err(message) => drop(unreadable.get_or_insert((at.document, message))),
    });
    let mut parsed = reader.parsed;
    if let Some((document, message)) = unreadable {
        let mut kept = 0;
        for (id, object) in before {
            parsed.objects.entry(id.clone()).or_insert_with(|| {
                kept += 1;
                object.clone()
            });
        }
        let kept = match kept {
            0 => "; it is ignored".to_owned(),
            kept => format!("; the last good state of what it may hold ({kept} objects) stays in force"),
        };
        let reason = format!("{}{kept}", FileError::Syntax { document, message });
        parsed.problems.push(Problem { object: shown.to_owned(), reason });
    }
    parsed
}

/// Returns the Pod `key` if the file has it.
///
/// # Errors
/// The file cannot be read, is not YAML (JSON), or the Pod is invalid.
pub(super) fn pod(path: &Path, key: &ObjectKey) -> Result<Option<Pod>, FileError> {
    let id = Id { kind: Kind::Pod, key: key.clone() };
    let mut found = None;
    let bytes = Bytes::default().read(path)?;
    let mut unreadable = None;
    documents(path, &bytes, &mut |document, at| {
        let mut value = match document {
            Ok(document) => document.value,
            Err(message) => {
                unreadable.get_or_insert(FileError::Syntax { document: at.document, message });
                return;
            }
        };
        let items = match value.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => vec![value],
        };
        let it = items.into_iter().find(|value| {
            text(value, "kind") == "Pod" && text(value, "apiVersion") == "v1" && id_of(Kind::Pod, value) == id
        });
        if let (Some(value), None) = (it, &found) {
            let pod = typed::<Pod>(Kind::Pod, value);
            found = Some(pod.map_err(|message| FileError::Syntax { document: at.document, message }));
        }
    });
    match (found, unreadable) {
        (Some(found), _) => found.map(Some),
        (None, Some(error)) => Err(error),
        (None, None) => Ok(None),
    }
}

struct Reader<'a> {
    shown: &'a str,
    before: &'a Objects,
    converter: &'a mut Converter,
    /// The objects so far, including broken ones.
    met: BTreeSet<Id>,
    parsed: Parsed,
}

impl Reader<'_> {
    /// Reads one document: an object or a list of objects.
    fn document(&mut self, mut value: Value, at: &At) {
        let kind = text(&value, "kind").to_owned();
        let api_version = text(&value, "apiVersion").to_owned();
        let Some(item_kind) = kind.strip_suffix("List") else {
            return self.object(value, &kind, &api_version, at);
        };
        let items = match value.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            None | Some(Value::Null) => return,
            Some(_) => return self.problem(at, None, "items is not a list; the document is ignored"),
        };
        for (i, item) in items.into_iter().enumerate() {
            let at = At { item: Some(i), ..*at };
            // In the API server's own lists, the items have no type.
            let own = (text(&item, "kind").to_owned(), text(&item, "apiVersion").to_owned());
            let (kind, api_version) = match &own {
                (kind, version) if kind.is_empty() && version.is_empty() => (item_kind, api_version.as_str()),
                (kind, version) => (kind.as_str(), version.as_str()),
            };
            self.object(item, kind, api_version, &at);
        }
    }

    fn object(&mut self, value: Value, kind_name: &str, api_version: &str, at: &At) {
        for (field, value) in [("kind", kind_name), ("apiVersion", api_version)] {
            if value.is_empty() {
                return self.problem(
                    at,
                    None,
                    &format!("{field} is missing or not a string; the object is ignored"),
                );
            }
        }
        let known = Kind::ALL.into_iter().find(|kind| {
            let (name, group, _) = kind.names();
            name == kind_name && is_of_group(api_version, group)
        });
        let Some(kind) = known else { return self.unknown(kind_name, api_version, at) };
        let (name, group, version) = kind.names();
        let is_workload = Kind::WORKLOADS.contains(&kind);
        if !is_workload && api_version.strip_prefix(group) != Some(version) {
            let reason =
                format!("apiVersion {api_version} is not read, use {group}{version}; the object is ignored");
            return self.problem(at, Some(name), &reason);
        }
        let id = id_of(kind, &value);
        let named = id.to_string();
        // The first object counts even if it is broken. Otherwise the previous content of the file would decide which
        // of the two counts.
        if !self.met.insert(id.clone()) {
            return self.problem(at, Some(&named), "the object is in this file already; this one is ignored");
        }
        let place = self.place(at, None);
        match convert(kind, value, &place, self.converter) {
            Ok(converted) => {
                for sentence in converted.said {
                    self.problem(at, Some(&named), &sentence);
                }
                let Converted { changes, part, .. } = converted;
                self.parsed.objects.insert(id, Object { changes, part, place: self.place(at, Some(&named)) });
            }
            Err(reason) => {
                let kept = self.before.get(&id).cloned();
                let state = outcome(kept.is_some());
                self.problem(at, Some(&named), &format!("{reason}; {state}"));
                self.parsed.objects.extend(kept.map(|object| (id, object)));
            }
        }
    }

    /// Leaves an object of an unknown kind. It is a problem only if the kind is a known one with other capitals.
    fn unknown(&mut self, kind_name: &str, api_version: &str, at: &At) {
        let meant = Kind::ALL
            .into_iter()
            .map(Kind::names)
            .find(|(name, group, _)| name.eq_ignore_ascii_case(kind_name) && is_of_group(api_version, group));
        if let Some((meant, ..)) = meant.filter(|(meant, ..)| *meant != kind_name) {
            let reason = format!("kind {kind_name:?} is none; {meant} may be meant; the object is ignored");
            return self.problem(at, None, &reason);
        }
        tracing::debug!(file = self.shown, document = at.document, kind = kind_name, api_version, "not read");
    }

    fn problem(&mut self, at: &At, object: Option<&str>, reason: &str) {
        let object = self.place(at, object);
        self.parsed.problems.push(Problem { object, reason: reason.to_owned() });
    }

    fn place(&self, at: &At, object: Option<&str>) -> String {
        let mut place = format!("{}, document {}", self.shown, at.document);
        if let Some(line) = at.line {
            place += &format!(" (line {line})");
        }
        if let Some(item) = at.item {
            place += &format!(", items[{item}]");
        }
        if let Some(object) = object {
            place += &format!(", {object}");
        }
        place
    }
}

/// Returns whether an `apiVersion` is of a group, which ends with a slash unless it is empty.
fn is_of_group(api_version: &str, group: &str) -> bool {
    api_version.strip_prefix(group).is_some_and(|version| !version.contains('/'))
}

/// Returns kind, namespace and name of an object that may otherwise be broken.
fn id_of(kind: Kind, value: &Value) -> Id {
    let meta = value.get("metadata").unwrap_or(&Value::Null);
    let namespace = match text(meta, "namespace") {
        _ if !kind.is_namespaced() => "",
        "" => DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    Id { kind, key: ObjectKey::new(namespace, text(meta, "name")) }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}
