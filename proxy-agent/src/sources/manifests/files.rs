//! The files of a manifest directory that are in force, and the objects in them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use super::file::Objects;
use super::id::{Id, Kind};
use super::object::Object;
use crate::reconcile::cluster::ObjectKey;
use crate::sources::update::Problem;

/// Content of all files.
#[derive(Default)]
pub(super) struct Files {
    pub(super) by_name: BTreeMap<OsString, File>,
    /// Files that have an object; the object is taken from the first of them.
    pub(super) places: BTreeMap<Id, BTreeSet<OsString>>,
}

#[derive(Default)]
pub(super) struct File {
    pub(super) stamp: Option<Stamp>,
    pub(super) objects: Objects,
    pub(super) problems: Vec<Problem>,
}

/// Metadata of a file; differs after any change that the metadata shows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

impl Files {
    /// Returns an object from the first file that has it.
    pub(super) fn object(&self, id: &Id) -> Option<&Object> {
        self.first(id, self.places.get(id)?)
    }

    pub(super) fn first(&self, id: &Id, places: &BTreeSet<OsString>) -> Option<&Object> {
        self.by_name.get(places.first()?)?.objects.get(id)
    }

    /// Returns the objects of a kind, by name.
    pub(super) fn all(&self, kind: Kind) -> impl Iterator<Item = (&Id, &Object)> {
        self.from(kind, "").take_while(move |(id, _)| id.kind == kind)
    }

    /// Returns the objects of a kind in a namespace, by name.
    pub(super) fn of_namespace<'a>(
        &'a self,
        kind: Kind,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Id, &'a Object)> {
        self.from(kind, namespace)
            .take_while(move |(id, _)| id.kind == kind && &*id.key.namespace == namespace)
    }

    fn from(&self, kind: Kind, namespace: &str) -> impl Iterator<Item = (&Id, &Object)> + use<'_> {
        let first = Id { kind, key: ObjectKey::new(namespace, "") };
        self.places.range(first..).filter_map(|(id, places)| Some((id, self.first(id, places)?)))
    }
}
