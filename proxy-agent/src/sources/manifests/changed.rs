//! Names of manifest files, and the files that may have changed.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};

/// Files that may have changed.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    /// Files to read even if their time stamps are the same: two writes may fall into one tick of the kernel's clock.
    pub(crate) files: BTreeSet<OsString>,
    /// Whether any file may have changed: files whose time stamps differ are read too.
    pub(crate) any: bool,
}

/// Returns whether a file with this name is a manifest.
pub(super) fn is_manifest(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|extension| name.ends_with(extension))
}
