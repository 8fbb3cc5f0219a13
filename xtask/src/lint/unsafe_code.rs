//! Checks that `unsafe` is written only in the files meant for it: adapters to the kernel, each small enough to review.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::source::{blank_comments_and_literals, rust_files};
use crate::workspace;

/// Files that may contain `unsafe`, relative to the workspace.
const ALLOWED: &[&str] = &[
    // Marker implementations: these types may be copied to and from BPF maps as bytes.
    "proxy-common/src/abi/pod.rs",
    // Map access, context access and helper calls of the BPF programs.
    "proxy-ebpf/src/cell.rs",
    "proxy-ebpf/src/main.rs",
    "proxy-ebpf/src/maps.rs",
    "proxy-ebpf/src/skb.rs",
    "proxy-ebpf/src/sock.rs",
    "proxy-ebpf/src/steps.rs",
    "proxy-ebpf/src/tables.rs",
    "proxy-ebpf/src/tc.rs",
    // The benchmark's own programs.
    "proxy-ebpf/src/bench.rs",
    // Raw system calls that the libraries lack.
    "proxy-agent/src/bpf/sys.rs",
    "proxy-agent/src/host/sys.rs",
    "proxy-agent/src/host/testing.rs",
    // The C library's settings for its heap.
    "proxy-agent/src/host/process.rs",
];

/// Directory in which every file called `sys.rs` may contain `unsafe`: each has the raw system calls of one test tool.
const ALLOWED_SYS: &str = "tests/src";

/// The document that lists these files for people, and the comment in front of its list.
const DOCUMENT: &str = "ARCHITECTURE.md";
const MARK: &str = "<!-- unsafe files -->";

fn is_allowed(file: &Path) -> bool {
    ALLOWED.iter().any(|allowed| file == Path::new(allowed))
        || file.starts_with(ALLOWED_SYS) && file.file_name().is_some_and(|name| name == "sys.rs")
}

/// Checks every Rust file of the workspace.
///
/// # Errors
/// With each place where `unsafe` is not allowed.
pub(super) fn check() -> Result<()> {
    let mut found = Vec::new();
    for package in workspace::packages()? {
        let directory = package.manifest.parent().context("a manifest has no directory")?;
        for file in rust_files(directory)? {
            let relative = file.strip_prefix(workspace::root()).unwrap_or(&file);
            if is_allowed(relative) {
                continue;
            }
            let source =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            found.extend(
                unsafe_lines(&source).into_iter().map(|line| format!("{}:{line}", relative.display())),
            );
        }
    }
    ensure!(found.is_empty(), "`unsafe` outside the files meant for it: {}", found.join(", "));
    let document = fs::read_to_string(workspace::root().join(DOCUMENT)).context(DOCUMENT)?;
    let tools = format!("{ALLOWED_SYS}/**/sys.rs");
    let allowed: Vec<&str> = ALLOWED.iter().copied().chain([tools.as_str()]).collect();
    ensure!(documented(&document) == allowed, "the list in {DOCUMENT} should be:\n{}", allowed.join("\n"));
    Ok(())
}

/// Returns the files that the document lists, in the block of text behind [`MARK`].
fn documented(document: &str) -> Vec<&str> {
    let block = document.split_once(MARK).map_or("", |(_, after)| after);
    block.lines().skip(2).take_while(|line| !line.starts_with("```")).collect()
}

/// Returns the numbers of the lines with the keyword `unsafe`, not counting comments and literals.
fn unsafe_lines(source: &str) -> Vec<usize> {
    let code = blank_comments_and_literals(source);
    let is_keyword =
        |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    code.lines().enumerate().filter(|(_, line)| is_keyword(line)).map(|(index, _)| index + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, want: &[usize]) {
        assert_eq!(unsafe_lines(source), want, "{source}");
    }

    #[test]
    fn files_are_allowed_by_path() {
        assert!(is_allowed(Path::new("proxy-agent/src/bpf/sys.rs")));
        assert!(is_allowed(Path::new("tests/src/lab/sys.rs")));
        assert!(!is_allowed(Path::new("proxy-agent/src/devices/sys.rs")));
        assert!(!is_allowed(Path::new("tests/src/lab/netns.rs")));
    }

    #[test]
    fn the_documents_list_is_read() {
        let document = "a\n<!-- unsafe files -->\n```text\nb.rs\nc.rs\n```\nd.rs\n";
        assert_eq!(documented(document), ["b.rs", "c.rs"]);
        assert!(documented("no list").is_empty());
    }

    #[test]
    fn the_keyword_is_found() {
        check("fn a() {\n    unsafe { b() }\n}", &[2]);
        check("unsafe impl Pod for A {}\n#[unsafe(no_mangle)]\nunsafe extern \"C\" {}", &[1, 2, 3]);
        check("let s = \"a\"; unsafe { b() }", &[1]);
        check("let c = '\"'; unsafe { b() } let d = '\"';", &[1]);
        check("fn a<'a>(b: &'a u8) { unsafe { c() } }", &[1]);
        check("let q = b'\\''; let r = r#\"x\"#; let r = br\"\\\"; unsafe { b() }", &[1]);
    }

    #[test]
    fn comments_literals_and_longer_words_do_not_count() {
        check("// unsafe\n/// unsafe\n/* unsafe /* \n unsafe */ unsafe */", &[]);
        check("#![deny(unsafe_code)] #![deny(unsafe_op_in_unsafe_fn)]", &[]);
        check("let s = \"unsafe \\\" unsafe\"; let c = 'u';", &[]);
        check("let s = r#\"unsafe \" unsafe\"#; let r#for = 1;", &[]);
        check("let s = \"one\ntwo unsafe\nthree\"; /* \n */ unsafe {}", &[4]);
    }
}
