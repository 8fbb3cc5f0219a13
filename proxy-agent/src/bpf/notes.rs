//! Notes of the agent's changes outside of the pin directory. `cleanup` reads them to take back the changes of all
//! agents, also of those that have died meanwhile, and no change of anybody else.
//!
//! ```text
//! <pin-dir>/made/clsact-<n>                the clsact queueing discipline of the device with index n
//! <pin-dir>/made/ports-<first>-<last>      ports that were added to net.ipv4.ip_local_reserved_ports
//! ```
//! A BPF file system holds only BPF objects and directories, so a note is an empty directory. A note never exists in
//! part, and lasts as long as the pins.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use proxy_common::abi::IfIndex;

use super::pins::{PinDir, PinError};

/// Something that the agent has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// The clsact queueing discipline of the device with this index has been added.
    Clsact(IfIndex),
    /// These ports have been reserved.
    Ports(RangeInclusive<u16>),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clsact(device) => write!(f, "clsact-{device}"),
            Self::Ports(ports) => write!(f, "ports-{}-{}", ports.start(), ports.end()),
        }
    }
}

impl Note {
    fn parse(name: &str) -> Option<Self> {
        let (what, rest) = name.split_once('-')?;
        match what {
            "clsact" => Some(Self::Clsact(IfIndex(rest.parse().ok()?))),
            "ports" => {
                let (first, last) = rest.split_once('-')?;
                Some(Self::Ports(first.parse().ok()?..=last.parse().ok()?))
            }
            _ => None,
        }
    }
}

/// The notes of a pin directory.
#[derive(Clone, Debug)]
pub(crate) struct Notes(PathBuf);

impl Notes {
    /// Returns the notes of `pins`.
    pub(crate) fn of(pins: &PinDir) -> Self {
        Self(pins.notes())
    }

    /// Writes a note, before the agent makes the change. Returns false if the note already existed.
    ///
    /// # Errors
    ///
    /// [`PinError::File`].
    pub(crate) fn add(&self, note: &Note) -> Result<bool, PinError> {
        let path = self.of_note(note);
        let made = std::fs::create_dir_all(&self.0).and_then(|()| std::fs::create_dir(&path));
        match made {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(source) => Err(PinError::File { path, source }),
        }
    }

    /// Removes a note if it exists, after the agent has taken the change back.
    ///
    /// # Errors
    ///
    /// [`PinError::File`].
    pub(crate) fn remove(&self, note: &Note) -> Result<(), PinError> {
        let path = self.of_note(note);
        match std::fs::remove_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(PinError::File { path, source }),
            _ => Ok(()),
        }
    }

    /// Returns whether the note exists.
    pub(crate) fn has(&self, note: &Note) -> bool {
        self.of_note(note).is_dir()
    }

    /// Returns all notes.
    ///
    /// # Errors
    ///
    /// [`PinError::File`].
    pub(crate) fn all(&self) -> Result<Vec<Note>, PinError> {
        let failed = |source| PinError::File { path: self.0.clone(), source };
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut notes = Vec::new();
        for entry in entries {
            notes.extend(Note::parse(&entry.map_err(failed)?.file_name().to_string_lossy()));
        }
        Ok(notes)
    }

    /// Returns the directory of the notes.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn of_note(&self, note: &Note) -> PathBuf {
        self.0.join(note.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let notes = Notes::of(&PinDir::new(dir.path()));
        assert_eq!(notes.all().unwrap(), []);
        let (clsact, ports) = (Note::Clsact(IfIndex(7)), Note::Ports(10000..=28999));
        for note in [&clsact, &ports] {
            assert!(!notes.has(note));
            assert!(notes.add(note).unwrap());
            assert!(!notes.add(note).unwrap(), "it is there");
            assert!(notes.has(note));
        }
        std::fs::create_dir(dir.path().join("made/something-else")).unwrap();
        let mut all = notes.all().unwrap();
        all.sort_by_key(Note::to_string);
        assert_eq!(all, [clsact.clone(), ports.clone()]);
        notes.remove(&clsact).unwrap();
        notes.remove(&clsact).unwrap();
        assert_eq!(notes.all().unwrap(), [ports]);
    }
}
