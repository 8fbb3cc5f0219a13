//! The state of a directory: what each file holds, and which file an object is taken from.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use super::bytes::Bytes;
use super::controllers::Controllers;
use super::file::{self, FileError, Id, Kind, Objects};
use super::object::Object;
use super::{Changed, is_manifest};
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::{Change, ObjectKey};
use crate::sources::Problem;
use crate::sources::convert::Converter;

/// Everything read so far of a directory.
pub struct Snapshot {
    directory: PathBuf,
    converter: Converter,
    bytes: Bytes,
    files: Files,
    controllers: Controllers,
    /// What was told last.
    problems: Vec<Problem>,
}

/// What is in all files.
#[derive(Default)]
pub(super) struct Files {
    by_name: BTreeMap<OsString, File>,
    /// The files that an object is in; the first one is where it is taken from.
    places: BTreeMap<Id, BTreeSet<OsString>>,
}

/// What one look at the directory brought.
pub struct Reading {
    /// Differences to what was read before.
    pub changes: Vec<Change>,
    /// The whole list, if it differs from the one before.
    pub problems: Option<Vec<Problem>>,
    /// The directory could not be read; nothing has changed then.
    pub unreadable: Option<io::Error>,
}

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    objects: Objects,
    problems: Vec<Problem>,
}

/// Differs after any change of a file that its metadata shows.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Snapshot {
    /// Nothing of `directory` is read yet; the rest is as for [`super::run`].
    pub fn new(directory: PathBuf, node_name: &str, opt_out: &Rules) -> Self {
        Self {
            directory,
            converter: Converter::new(node_name).with_opt_out(opt_out.clone()),
            bytes: Bytes::default(),
            files: Files::default(),
            controllers: Controllers::new(node_name),
            problems: Vec::new(),
        }
    }

    /// Looks at what may have changed.
    pub fn read(&mut self, changed: &Changed) -> Reading {
        let mut unreadable = None;
        let mut names = changed.files.clone();
        if changed.any {
            match self.listed() {
                Ok(listed) => {
                    names.extend(self.files.by_name.keys().filter(|name| !listed.contains(*name)).cloned());
                    names.extend(listed.into_iter().filter(|name| self.differs(name)));
                }
                // While the directory is gone nothing in it counts as deleted.
                Err(error) => {
                    names.clear();
                    unreadable = Some(error);
                }
            }
        }
        let mut before = BTreeMap::new();
        for name in names {
            self.read_file(name, &mut before);
        }
        let changes = self.differences(before);
        let problems = self.list_problems(unreadable.as_ref());
        let problems = (problems != self.problems).then(|| {
            self.problems.clone_from(&problems);
            problems
        });
        Reading { changes, problems, unreadable }
    }

    /// The names of all manifests in the directory.
    fn listed(&self) -> io::Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            if is_manifest(&name) {
                names.insert(name);
            }
        }
        Ok(names)
    }

    fn differs(&self, name: &OsStr) -> bool {
        let stamp = fs::metadata(self.directory.join(name)).ok().map(|metadata| Stamp::of(&metadata));
        self.files.by_name.get(name).map_or(stamp.is_some(), |file| file.stamp != stamp)
    }

    /// Reads one file anew; puts what was in force of the objects it touches into `before`.
    fn read_file(&mut self, name: OsString, before: &mut BTreeMap<Id, Vec<Change>>) {
        let mut file = self.files.by_name.remove(&name).unwrap_or_default();
        let path = self.directory.join(&name);
        // The stamp is from before the reading: a write in between makes it differ.
        let metadata = fs::metadata(&path);
        file.stamp = metadata.as_ref().ok().map(Stamp::of);
        let shown = name.to_string_lossy();
        let new = match metadata {
            Ok(_) => {
                let text = self.bytes.read(&path);
                text.map(|text| file::read(&path, &text, &shown, &file.objects, &mut self.converter))
            }
            Err(error) => Err(FileError::Io(error)),
        };
        let (objects, exists) = match new {
            Ok(parsed) => {
                file.problems = parsed.problems;
                (parsed.objects, true)
            }
            Err(error) if error.is_not_found() => (Objects::new(), false),
            Err(error) => {
                let kept = match file.objects.len() {
                    0 => String::new(),
                    kept => format!("; its last good state ({kept} objects) stays in force"),
                };
                if matches!(error, FileError::Slow) {
                    // Whatever its time stamps say, it is to be read when it can be.
                    file.stamp = None;
                }
                file.problems =
                    vec![Problem { object: shown.into_owned(), reason: format!("{error}{kept}") }];
                self.files.by_name.insert(name, file);
                return;
            }
        };
        let old = std::mem::take(&mut file.objects);
        let touched: BTreeSet<Id> = old.keys().chain(objects.keys()).cloned().collect();
        // Put back for a moment: what is in force is asked of all files.
        self.files.by_name.insert(name.clone(), File { objects: old, ..File::default() });
        for id in touched {
            if !before.contains_key(&id) {
                before.insert(id.clone(), self.in_force(&id));
            }
            let places = self.files.places.entry(id.clone()).or_default();
            if objects.contains_key(&id) {
                places.insert(name.clone());
            } else {
                places.remove(&name);
                if places.is_empty() {
                    self.files.places.remove(&id);
                }
            }
        }
        if exists {
            file.objects = objects;
            self.files.by_name.insert(name, file);
        } else {
            self.files.by_name.remove(&name);
        }
    }

    /// What is in force of an object, with what it was given.
    fn in_force(&self, id: &Id) -> Vec<Change> {
        let mut changes = self.files.object(id).map_or_else(Vec::new, |object| object.changes.clone());
        for change in &mut changes {
            if let Change::Service(service) = change {
                self.controllers.complete(service);
            }
        }
        changes
    }

    /// What must be said now that the objects that `before` names may differ.
    fn differences(&mut self, mut before: BTreeMap<Id, Vec<Change>>) -> Vec<Change> {
        if before.keys().any(|id| matches!(id.kind, Kind::Service | Kind::ServiceCidr)) {
            let given = self.controllers.assign(&self.files);
            for key in self.controllers.differing(&given) {
                let id = Id { kind: Kind::Service, key };
                if !before.contains_key(&id) {
                    before.insert(id.clone(), self.in_force(&id));
                }
            }
            self.controllers.give(given);
        }
        let mut changes = Vec::new();
        for (id, before) in &before {
            difference(before, &self.in_force(id), &mut changes);
        }
        changes.extend(self.controllers.follow(&self.files, before.keys()));
        changes
    }

    fn list_problems(&self, unreadable: Option<&io::Error>) -> Vec<Problem> {
        let mut problems: Vec<_> = unreadable
            .map(|error| Problem {
                object: self.directory.display().to_string(),
                reason: format!("cannot be read: {error}; what was in it stays in force until it is back"),
            })
            .into_iter()
            .collect();
        problems.extend(self.files.by_name.values().flat_map(|file| file.problems.iter().cloned()));
        problems.extend(self.controllers.problems().cloned());
        for (id, places) in self.files.places.iter().filter(|(_, places)| places.len() > 1) {
            let mut names = places.iter().map(|name| name.to_string_lossy());
            let first = names.next().unwrap_or_default();
            problems.extend(names.map(|name| Problem {
                object: format!("{name} ({id})"),
                reason: format!("the object is in {first} too, which comes first; this one is ignored"),
            }));
        }
        problems
    }
}

impl Files {
    /// An object, from the first file that has it.
    fn object(&self, id: &Id) -> Option<&Object> {
        self.first(id, self.places.get(id)?)
    }

    fn first(&self, id: &Id, places: &BTreeSet<OsString>) -> Option<&Object> {
        self.by_name.get(places.first()?)?.objects.get(id)
    }

    /// The objects of a kind, by name.
    pub(super) fn all(&self, kind: Kind) -> impl Iterator<Item = (&Id, &Object)> {
        self.from(kind, "").take_while(move |(id, _)| id.kind == kind)
    }

    /// Those of a namespace.
    pub(super) fn of_namespace<'a>(
        &'a self,
        kind: Kind,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Id, &'a Object)> {
        let is_in = move |id: &Id| id.kind == kind && &*id.key.namespace == namespace;
        self.from(kind, namespace).take_while(move |(id, _)| is_in(id))
    }

    fn from(&self, kind: Kind, namespace: &str) -> impl Iterator<Item = (&Id, &Object)> + use<'_> {
        let first = Id { kind, key: ObjectKey::new(namespace, "") };
        self.places.range(first..).filter_map(|(id, places)| Some((id, self.first(id, places)?)))
    }
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What must be said for `before` to become `after`.
fn difference(before: &[Change], after: &[Change], changes: &mut Vec<Change>) {
    let kept: Vec<_> = after.iter().filter_map(Change::gone).collect();
    changes.extend(before.iter().filter_map(Change::gone).filter(|gone| !kept.contains(gone)));
    changes.extend(after.iter().filter(|change| !before.contains(change)).cloned());
}
