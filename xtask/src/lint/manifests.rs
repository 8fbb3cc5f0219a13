//! Every member of the workspace takes the workspace's lints: a table that a crate does not ask for never applies.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::workspace;

/// Checks all members.
///
/// # Errors
/// Names the manifests that lack the lines.
pub(super) fn check() -> Result<()> {
    let mut lacking = Vec::new();
    for package in workspace::packages()? {
        let manifest = &package.manifest;
        let text =
            fs::read_to_string(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        if !takes_workspace_lints(&text) {
            lacking.push(manifest.display().to_string());
        }
    }
    ensure!(lacking.is_empty(), "`[lints]` with `workspace = true` is missing in {}", lacking.join(", "));
    Ok(())
}

fn takes_workspace_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim);
    lines.by_ref().any(|line| line == "[lints]")
        && lines.take_while(|line| !line.starts_with('[')).any(|line| line == "workspace = true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_counts_only_in_its_table() {
        assert!(takes_workspace_lints("[package]\nname = \"x\"\n\n[lints]\nworkspace = true\n"));
        assert!(!takes_workspace_lints("[package]\nname = \"x\"\n"));
        assert!(!takes_workspace_lints("[lints]\n\n[dependencies.x]\nworkspace = true\n"));
        assert!(!takes_workspace_lints("[dependencies.x]\nworkspace = true\n\n[lints]\n"));
    }
}
