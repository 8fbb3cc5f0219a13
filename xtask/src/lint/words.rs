//! Words: doc comments open with what they describe, and maps are named by the catalogue.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::source::rust_files;
use crate::workspace;

/// Words that make a relative clause of a sentence. A noun phrase or a verb in the third person says the same at once.
const OPENINGS: [&str; 6] = ["What", "Whose", "Whom", "How", "Where", "Who"];

/// The catalogue of maps, the only file that spells their names.
const CATALOGUE: &str = "proxy-common/src/abi/maps.rs";

/// Checks every Rust file of the workspace.
///
/// # Errors
/// Names each place.
pub(super) fn check() -> Result<()> {
    let root = workspace::root();
    let catalogue = fs::read_to_string(root.join(CATALOGUE)).context("cannot read the catalogue of maps")?;
    let maps = maps_of(&catalogue);
    ensure!(!maps.is_empty(), "the catalogue of maps names none");
    let mut found = Vec::new();
    for package in workspace::packages()? {
        let directory = package.manifest.parent().context("a manifest has no directory")?;
        for file in rust_files(directory)? {
            let relative = file.strip_prefix(root).unwrap_or(&file);
            let name = relative.display();
            let source =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            found.extend(openings(&source).into_iter().map(|(line, word)| {
                format!("{name}:{line}: the comment opens with {word}; name the thing, or say what it does")
            }));
            if names_maps(relative) {
                found.extend(literals(&source, &maps).into_iter().map(|(line, map)| {
                    format!("{name}:{line}: use proxy_common::abi::maps::{map} instead of the literal")
                }));
            }
        }
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// Returns whether the names of maps are meant by such words in a file.
fn names_maps(file: &Path) -> bool {
    file != Path::new(CATALOGUE) && !file.starts_with("xtask")
}

/// Returns the names that the catalogue declares, one at the beginning of each entry.
fn maps_of(catalogue: &str) -> Vec<&str> {
    catalogue
        .lines()
        .filter_map(|line| line.strip_prefix("    ")?.split_once(": "))
        .map(|(name, _)| name)
        .filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !name.is_empty())
        .collect()
}

/// Returns the lines on which a comment begins with one of [`OPENINGS`].
fn openings(source: &str) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in (1..).zip(source.lines()) {
        let comment =
            line.trim_start().strip_prefix("//").map(|rest| rest.trim_start_matches(['/', '!']).trim_start());
        if let Some(text) = comment
            && !inside
        {
            let first = text.split(|c: char| !c.is_alphanumeric()).next();
            found.extend(OPENINGS.iter().find(|word| first == Some(**word)).map(|word| (number, *word)));
        }
        inside = comment.is_some();
    }
    found
}

/// Returns the lines with the name of a map as a literal.
fn literals<'m>(source: &str, maps: &[&'m str]) -> Vec<(usize, &'m str)> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(source.lines()) {
        // Columns of tables and names of values are no maps, though they may be spelled like one.
        if line.trim_start().starts_with("//")
            || ["value_name", "\"ENDPOINTS\""].iter().any(|no| line.contains(no))
        {
            continue;
        }
        found
            .extend(maps.iter().filter(|map| line.contains(&format!("\"{map}\""))).map(|map| (number, *map)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openings_are_found() {
        for (source, want) in [
            ("/// What is left.\nfn a() {}", &[(1, "What")][..]),
            ("    //! Whose it is.", &[(1, "Whose")]),
            ("// How\n// Where the second line does not count.", &[(1, "How")]),
            ("fn a() {}\n/// Who?\n\n/// Whoever comes.\n/// Whether it is.", &[(2, "Who")]),
            ("let text = \"What\"; // What at the end of a line", &[]),
        ] {
            assert_eq!(openings(source), want, "{source}");
        }
    }

    #[test]
    fn maps_are_those_of_the_catalogue() {
        let catalogue = "const A: u8 = 1;\n    FLOWS: Hash<A, B>, true,\n        \"key\", \"value\";\n    pub name: u8,\n";
        assert_eq!(maps_of(catalogue), ["FLOWS"]);
    }

    #[test]
    fn literals_are_found() {
        let source =
            "open(\"FLOWS\");\n// \"FLOWS\"\n#[arg(value_name = \"FLOWS\")]\nopen(\"FLOWS-larger\");";
        assert_eq!(literals(source, &["FLOWS", "NODE"]), [(1, "FLOWS")]);
    }
}
