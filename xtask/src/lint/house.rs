//! The house of the code: a room imports only rooms above it, files do not import each other in circles, and the pure
//! parts stay pure.
//!
//! The agent's rooms are the modules of `proxy-agent/src/lib.rs`: each imports only rooms that stand above it there.
//! Tests may import what they like.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::source::{blank_comments_and_literals, rust_files};
use crate::workspace;

/// Crates whose files must not import each other in circles.
const CRATES: [&str; 4] = ["proxy-common/src", "proxy-ebpf/src", "proxy-agent/src", "xtask/src"];

/// The crate with rooms.
const AGENT: &str = "proxy-agent/src";

/// Code without input and output: what it is given decides what it returns.
const PURE: [&str; 2] = ["proxy-common/src", "proxy-agent/src/reconcile"];

/// Marker implementations for aya, behind a feature that only the agent sets.
const MARKERS: &str = "proxy-common/src/abi/pod.rs";

/// Paths by which input, output, clocks and the libraries for them come in.
const IMPURE: [&[&str]; 14] = [
    &["tokio"],
    &["aya"],
    &["kube"],
    &["tracing"],
    &["rustix"],
    &["libc"],
    &["rtnetlink"],
    &["std", "fs"],
    &["std", "env"],
    &["std", "process"],
    &["std", "thread"],
    &["std", "net", "UdpSocket"],
    &["Instant", "now"],
    &["SystemTime", "now"],
];

/// Checks all of it.
///
/// # Errors
/// Names each import that runs upward, each circle and each impure path.
pub(super) fn check() -> Result<()> {
    let mut found = Vec::new();
    for directory in CRATES {
        let house = House::read(&workspace::root().join(directory))?;
        found.extend(house.circles().into_iter().map(|circle| format!("{directory}: circle of {circle}")));
        if directory == AGENT {
            found.extend(house.upward()?);
        }
        found.extend(house.impure(directory));
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// A module's path below the crate: `["bpf", "maps"]`; empty for the crate itself.
type Module = Vec<String>;

/// A crate's files without its tests.
struct House {
    /// The file of each module, relative to the crate.
    files: BTreeMap<Module, PathBuf>,
    /// The paths that each file names.
    paths: BTreeMap<PathBuf, Vec<Module>>,
    /// Rooms in the order of the crate's root.
    rooms: Vec<String>,
}

impl House {
    fn read(directory: &Path) -> Result<Self> {
        let mut sources = Vec::new();
        for file in rust_files(directory)? {
            let source =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            sources.push((file.strip_prefix(directory)?.to_owned(), source));
        }
        Ok(Self::of(sources))
    }

    fn of(sources: Vec<(PathBuf, String)>) -> Self {
        let (mut files, mut codes, mut rooms) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (file, source) in sources {
            let module = module_of(&file);
            if is_test(&module) {
                continue;
            }
            let code = without_tests(&blank_comments_and_literals(&source));
            if module.is_empty() && file.ends_with("lib.rs") {
                let names = code.split(';').filter_map(|item| item.trim().rsplit_once("mod "));
                rooms = names.map(|(_, name)| name.to_owned()).collect();
            }
            codes.push((file.clone(), module.clone(), code));
            files.insert(module, file);
        }
        let paths = codes
            .into_iter()
            .map(|(file, module, code)| {
                let paths = paths(&code);
                let absolute = paths.iter().map(|path| absolute(path, &module, &files)).collect();
                (file, absolute)
            })
            .collect();
        Self { files, paths, rooms }
    }

    /// Returns the file that an absolute path leads to: that of its longest beginning that is a module.
    fn file_of(&self, path: &[String]) -> Option<&PathBuf> {
        (1..=path.len()).rev().find_map(|length| self.files.get(&path[..length]))
    }

    /// Returns each file's imports of other files of the crate.
    fn imports(&self) -> BTreeMap<&PathBuf, BTreeSet<&PathBuf>> {
        let files = self.paths.iter().map(|(file, paths)| {
            let imports = paths
                .iter()
                .filter(|path| path.first().is_some_and(|first| first == CRATE))
                .filter_map(|path| self.file_of(&path[1..]))
                .filter(|import| *import != file);
            (file, imports.collect())
        });
        files.collect()
    }

    /// Returns one sentence for each import of a room that comes later in the crate's root.
    fn upward(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for (file, imports) in self.imports() {
            for import in imports {
                if let (Some(from), Some(to)) = (self.place(file)?, self.place(import)?)
                    && from < to
                {
                    found.push(format!(
                        "{} imports {}, whose room comes later in lib.rs",
                        file.display(),
                        import.display()
                    ));
                }
            }
        }
        Ok(found)
    }

    fn place(&self, file: &Path) -> Result<Option<usize>> {
        let room = module_of(file).first().cloned();
        let place = self.rooms.iter().position(|name| Some(name) == room.as_ref());
        room.map(|room| place.with_context(|| format!("room {room} is not in lib.rs"))).transpose()
    }

    /// Returns the files of each circle.
    fn circles(&self) -> Vec<String> {
        let imports = self.imports();
        let reach: BTreeMap<_, _> = imports.keys().map(|file| (*file, reachable(file, &imports))).collect();
        let mut circles = BTreeSet::new();
        for (file, reached) in &reach {
            let circle: Vec<_> = reached.iter().filter(|other| reach[**other].contains(file)).collect();
            if !circle.is_empty() {
                circles.insert(
                    circle.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "),
                );
            }
        }
        circles.into_iter().collect()
    }

    /// Returns one sentence for each path to input or output in the pure parts.
    fn impure(&self, directory: &str) -> Vec<String> {
        let mut found = Vec::new();
        for (file, paths) in &self.paths {
            let whole = Path::new(directory).join(file);
            if whole == Path::new(MARKERS) || !PURE.iter().any(|pure| whole.starts_with(pure)) {
                continue;
            }
            for path in paths {
                if IMPURE.iter().any(|out| path.windows(out.len()).any(|part| part == *out)) {
                    found.push(format!("{} is pure and names {}", whole.display(), path.join("::")));
                }
            }
        }
        found
    }
}

fn reachable<'a>(
    file: &'a PathBuf,
    imports: &BTreeMap<&'a PathBuf, BTreeSet<&'a PathBuf>>,
) -> BTreeSet<&'a PathBuf> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<_> = imports[file].iter().copied().collect();
    while let Some(file) = next.pop() {
        if reached.insert(file) {
            next.extend(imports.get(file).into_iter().flatten());
        }
    }
    reached
}

fn module_of(file: &Path) -> Module {
    let mut module: Module =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| last == "mod") || module == ["lib"] {
        module.pop();
    }
    module
}

fn is_test(module: &Module) -> bool {
    module.iter().any(|part| matches!(part.as_str(), "tests" | "testing" | "reference"))
}

/// Cuts off the tests at the end of a file.
fn without_tests(code: &str) -> String {
    let tests = code.match_indices("#[cfg(test)]").find(|(at, _)| {
        let after = code[at + "#[cfg(test)]".len()..].trim_start();
        after.starts_with("mod ") && after.find('{') < after.find(';')
    });
    code[..tests.map_or(code.len(), |(at, _)| at)].to_owned()
}

/// First part of the absolute path of what is in this crate.
const CRATE: &str = "crate";

/// Returns every path that code names: those of `use`, one for each leaf of a tree, and those within expressions.
fn paths(code: &str) -> Vec<Module> {
    let mut paths = Vec::new();
    let mut rest = String::new();
    for (number, item) in code.split(';').enumerate() {
        let at = item.rfind("use ").filter(|at| {
            let before = item[..*at].trim_end();
            before.is_empty() || before.ends_with(['}', '{', ']', ')']) || before.ends_with("pub")
        });
        match at {
            Some(at) => {
                rest.push_str(&item[..at]);
                leaves("", &item[at + 4..], &mut paths);
            }
            None => rest.push_str(item),
        }
        if number > 0 || at.is_none() {
            rest.push(';');
        }
    }
    // A module to which something is visible is no import.
    let rest = rest.split("pub(in ").map(|part| part.split_once(')').map_or(part, |(_, after)| after));
    let rest = rest.collect::<Vec<_>>().join(" ");
    let words = rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
    for word in words.filter(|word| word.contains("::")) {
        leaves("", word, &mut paths);
    }
    paths
}

/// Splits a tree of `use` into its leaves.
fn leaves(prefix: &str, tree: &str, paths: &mut Vec<Module>) {
    let tree = tree.trim();
    if let Some((before, branches)) = tree.split_once('{') {
        let branches = branches.trim_end().strip_suffix('}').unwrap_or(branches);
        let prefix = format!("{prefix}{}", before.trim());
        let (mut depth, mut start) = (0_u32, 0);
        for (at, c) in branches.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                ',' if depth == 0 => {
                    leaves(&prefix, &branches[start..at], paths);
                    start = at + 1;
                }
                _ => {}
            }
        }
        leaves(&prefix, &branches[start..], paths);
    } else if !tree.is_empty() {
        let path = format!("{prefix}{tree}");
        let path = path.split(" as ").next().unwrap_or_default();
        let parts = path.split("::").map(|part| part.trim().to_owned());
        paths.push(parts.filter(|part| !part.is_empty() && part != "self" && part != "*").collect());
    }
}

/// Returns a path from the crate's root, beginning with [`CRATE`]; one of another crate stays as it is.
fn absolute(path: &Module, module: &Module, files: &BTreeMap<Module, PathBuf>) -> Module {
    let ups = path.iter().take_while(|part| *part == "super").count();
    let child = || module.iter().chain(path.first()).cloned().collect::<Module>();
    let above: &[String] = match path.first().map(String::as_str) {
        Some("super") => &module[..module.len().saturating_sub(ups)],
        Some(first) if first != CRATE && !module.is_empty() && files.contains_key(&child()) => module,
        _ => return path.clone(),
    };
    [CRATE.to_owned()].into_iter().chain(above.iter().cloned()).chain(path[ups..].iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn house(files: &[(&str, &str)]) -> House {
        House::of(files.iter().map(|(file, code)| (PathBuf::from(file), (*code).to_owned())).collect())
    }

    const ROOMS: (&str, &str) = ("lib.rs", "/// Lower.\npub mod low;\n\npub mod high;\n");

    #[test]
    fn imports_run_downward() {
        for (low, high, want) in [
            ("use crate::high::B;", "", 1),
            ("pub use crate::{high::{self, B}, low::C};", "", 1),
            ("fn f() -> crate::high::B { b() }", "", 1),
            ("use super::high;", "", 1),
            ("pub(in crate::high) struct A;", "", 0),
            ("", "use crate::low::A;", 0),
            ("// use crate::high::B;\nconst A: &str = \"crate::high::B\";", "", 0),
            ("#[cfg(test)]\nmod tests {\n    use crate::high::B;\n}", "", 0),
        ] {
            let house = house(&[ROOMS, ("low/mod.rs", low), ("high.rs", high)]);
            assert_eq!(house.upward().unwrap().len(), want, "{low} {high}");
        }
    }

    #[test]
    fn a_room_that_the_root_does_not_name_is_an_error() {
        assert!(house(&[ROOMS, ("low.rs", "use crate::third::A;"), ("third.rs", "")]).upward().is_err());
    }

    #[test]
    fn circles_are_found() {
        for (files, want) in [
            (&[("a.rs", "use crate::b::B;"), ("b.rs", "use crate::a::A;")][..], &["a.rs, b.rs"][..]),
            (&[("a/mod.rs", "mod b; use b::B;"), ("a/b.rs", "use super::A;")], &["a/b.rs, a/mod.rs"]),
            (&[("a/mod.rs", "mod b; pub use self::b::B;"), ("a/b.rs", "struct B;")], &[]),
            (
                &[
                    ("a.rs", "use crate::b::B;"),
                    ("b.rs", "use crate::c::C;"),
                    ("c.rs", "fn f() { crate::a::f() }"),
                ],
                &["a.rs, b.rs, c.rs"],
            ),
        ] {
            assert_eq!(house(files).circles(), want, "{files:?}");
        }
    }

    #[test]
    fn input_and_output_are_found_in_pure_parts_only() {
        let files = [
            ("reconcile/a.rs", "use std::{fs, io};\nfn f() { let a = std::time::Instant::now(); }"),
            ("host.rs", "use std::fs;"),
        ];
        let found = house(&files).impure(AGENT);
        assert_eq!(found.len(), 2, "{found:?}");
    }
}
