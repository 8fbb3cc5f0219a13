//! Directories of manifests.

use std::collections::BTreeSet;
use std::fs;

use crate::sources::manifests::snapshot::Reading;
use crate::sources::manifests::{Changed, Snapshot};

use super::files::{directory, parts, write};
use super::node::{NAME, Node, check_problems, speaks_of_witness};

/// Line after which the file's next content begins.
const THEN: &[u8] = b"@then";
/// First line of an input whose file is named as JSON.
const JSON: &[u8] = b"@json\n";
/// Largest number of contents that are read.
const CONTENTS: usize = 4;

/// Valid file beside the one with the input.
const GOOD: &str = "
apiVersion: v1
kind: Service
metadata: {namespace: witness, name: witness}
spec: {clusterIP: 10.96.255.254, ports: [{port: 80}]}
";

/// Reads `data` as one or more contents of a manifest, one after the other in the same file. Valid objects are
/// programmed; errors are reported and do not affect other files. In the end the file is removed, and nothing of it
/// remains.
///
/// # Panics
/// If a manifest affects another one, is read differently the second time, or leaves something behind.
pub fn manifests(data: &[u8]) {
    let directory = directory();
    let (name, data) = match data.strip_prefix(JSON) {
        Some(data) => ("a.json", data),
        None => ("a.yaml", data),
    };
    write(&directory.path().join("good.yaml"), GOOD.as_bytes());
    let path = directory.path().join(name);
    let mut snapshot = Snapshot::new(directory.path().to_owned(), NAME, &Node::config().opt_out);
    let mut node = Node::new();
    let mut any = true;
    for content in parts(data, THEN).into_iter().take(CONTENTS) {
        write(&path, content);
        let changed = Changed { files: BTreeSet::from([name.into()]), any };
        let read = snapshot.read(&changed);
        take(&mut node, read);
        assert!(node.has_witness() || speaks_of_witness(data));
        let again = snapshot.read(&changed);
        assert_eq!(again.changes, [], "read again it means something else");
        assert_eq!(again.problems, None, "read again something else is wrong with it");
        any = false;
    }
    node.ask();
    fs::remove_file(&path).expect("it is there");
    take(&mut node, snapshot.read(&Changed { files: BTreeSet::from([name.into()]), any: true }));
    assert!(node.has_witness());
    assert_eq!(node.services(), 1);
    node.end();
}

fn take(node: &mut Node, Reading { changes, problems, unreadable }: Reading) {
    assert!(unreadable.is_none(), "{unreadable:?}");
    check_problems(&problems.unwrap_or_default());
    node.take(changes);
}
