//! State of a directory: the content of each file, and the file from which each object is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use super::bytes::Bytes;
use super::bytes::FileError;
use super::changed::{Changed, is_manifest};
use super::controllers::Controllers;
use super::file::{self, Objects};
use super::files::{File, Files, Stamp};
use super::id::{Id, Kind};
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::Change;
use crate::sources::convert::Converter;
use crate::sources::update::Problem;

/// Everything read so far of a directory.
pub(crate) struct Snapshot {
    directory: PathBuf,
    converter: Converter,
    bytes: Bytes,
    files: Files,
    controllers: Controllers,
    /// Problems that were reported last.
    problems: Vec<Problem>,
}

/// Result of one scan of the directory.
pub(crate) struct Reading {
    /// Differences from the previous state.
    pub(crate) changes: Vec<Change>,
    /// All problems, if they differ from the previous ones.
    pub(crate) problems: Option<Vec<Problem>>,
    /// Error if the directory could not be read; there are no changes then.
    pub(crate) unreadable: Option<io::Error>,
}

impl Snapshot {
    /// Creates a snapshot without reading `directory`. The other arguments are those of [`super::run`].
    pub(crate) fn new(directory: PathBuf, node_name: &str, opt_out: &Rules) -> Self {
        Self {
            directory,
            converter: Converter::new(node_name).with_opt_out(opt_out.clone()),
            bytes: Bytes::default(),
            files: Files::default(),
            controllers: Controllers::new(node_name),
            problems: Vec::new(),
        }
    }

    /// Reads the files that may have changed.
    pub(crate) fn read(&mut self, changed: &Changed) -> Reading {
        let mut unreadable = None;
        let mut names = changed.files.clone();
        if changed.any {
            match self.listed() {
                Ok(listed) => {
                    names.extend(self.files.by_name.keys().filter(|name| !listed.contains(*name)).cloned());
                    names.extend(listed.into_iter().filter(|name| self.differs(name)));
                }
                // While the directory is gone, none of its files counts as deleted.
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

    /// Returns the names of all manifests in the directory.
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

    /// Reads one file anew. Adds to `before` the changes in force for each object that its old or new content has.
    fn read_file(&mut self, name: OsString, before: &mut BTreeMap<Id, Vec<Change>>) {
        let mut file = self.files.by_name.remove(&name).unwrap_or_default();
        let path = self.directory.join(&name);
        // The stamp is taken before the file is read, so that a write in between makes it differ.
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
                    // The file is to be read again even if its time stamps stay the same.
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
        // The old objects are put back for a moment, because `in_force` looks at all files.
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

    /// Returns the changes in force for an object, including the numbers that it was assigned.
    fn in_force(&self, id: &Id) -> Vec<Change> {
        let mut changes = self.files.object(id).map_or_else(Vec::new, |object| object.changes.clone());
        for change in &mut changes {
            if let Change::Service(service) = change {
                self.controllers.complete(service);
            }
        }
        changes
    }

    /// Returns the changes that are due because the objects in `before` may differ now.
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

/// Appends the changes that turn `before` into `after`.
fn difference(before: &[Change], after: &[Change], changes: &mut Vec<Change>) {
    let kept: Vec<_> = after.iter().filter_map(Change::gone).collect();
    changes.extend(before.iter().filter_map(Change::gone).filter(|gone| !kept.contains(gone)));
    changes.extend(after.iter().filter(|change| !before.contains(change)).cloned());
}
