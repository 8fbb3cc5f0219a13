//! `unsafe` is written only in the files that exist for it: adapters to the kernel, each small enough to review.

use std::fs;
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::str::Chars;

use anyhow::{Context as _, Result, ensure};

use crate::workspace;

/// The files that may contain `unsafe`, relative to the workspace.
const ALLOWED: &[&str] = &[
    // Marker implementations: these types may be copied to and from BPF maps as bytes.
    "proxy-common/src/abi/pod.rs",
    // Map access, context access and helper calls of the BPF programs.
    "proxy-ebpf/src/cell.rs",
    "proxy-ebpf/src/main.rs",
    "proxy-ebpf/src/maps.rs",
    "proxy-ebpf/src/sock.rs",
    "proxy-ebpf/src/steps.rs",
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

/// In this directory, every file called `sys.rs` may: each is the raw system calls of one test tool.
const ALLOWED_SYS: &str = "tests/src";

fn is_allowed(file: &Path) -> bool {
    ALLOWED.iter().any(|allowed| file == Path::new(allowed))
        || file.starts_with(ALLOWED_SYS) && file.file_name().is_some_and(|name| name == "sys.rs")
}

/// Checks every Rust file of the workspace.
///
/// # Errors
/// Names each place that is not allowed.
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
    Ok(())
}

fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", directory.display()))?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The numbers of the lines with the keyword `unsafe`, not counting comments and literals.
fn unsafe_lines(source: &str) -> Vec<usize> {
    let code = blank_comments_and_literals(source);
    let is_keyword =
        |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    code.lines().enumerate().filter(|(_, line)| is_keyword(line)).map(|(index, _)| index + 1).collect()
}

/// The source without what is inside comments, strings and characters; line breaks stay.
fn blank_comments_and_literals(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut chars = source.chars().peekable();
    let mut previous = ' ';
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => skip_while(&mut chars, &mut code, |c| c != '\n'),
            '/' if chars.peek() == Some(&'*') => skip_block_comment(&mut chars, &mut code),
            '"' => skip_quoted(&mut chars, &mut code, '"'),
            // A raw string; r#name is an identifier and stays as it is.
            'r' if !previous.is_alphanumeric() && previous != '_' || previous == 'b' => {
                skip_raw_string(&mut chars, &mut code);
            }
            '\'' => {
                // A character literal, unless it is a lifetime: 'a without a closing quote.
                let mut ahead = chars.clone();
                match (ahead.next(), ahead.next()) {
                    (Some('\\'), _) | (Some(_), Some('\'')) => skip_quoted(&mut chars, &mut code, '\''),
                    _ => code.push(c),
                }
            }
            _ => code.push(c),
        }
        previous = c;
    }
    code
}

fn skip_while(chars: &mut Peekable<Chars<'_>>, code: &mut String, condition: impl Fn(char) -> bool) {
    while let Some(c) = chars.next_if(|&c| condition(c)) {
        keep_line_break(code, c);
    }
}

fn skip_block_comment(chars: &mut Peekable<Chars<'_>>, code: &mut String) {
    let mut depth = 0;
    let mut previous = '/';
    for c in chars.by_ref() {
        keep_line_break(code, c);
        match (previous, c) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                previous = c;
                continue;
            }
        }
        if depth == 0 {
            break;
        }
        previous = ' ';
    }
}

fn skip_quoted(chars: &mut Peekable<Chars<'_>>, code: &mut String, quote: char) {
    while let Some(c) = chars.next() {
        keep_line_break(code, c);
        if c == '\\' {
            chars.next().inspect(|&escaped| keep_line_break(code, escaped));
        } else if c == quote {
            break;
        }
    }
}

/// Called after an `r`: skips `"…"` or `#"…"#`, else leaves everything and keeps the `r`.
fn skip_raw_string(chars: &mut Peekable<Chars<'_>>, code: &mut String) {
    let mut ahead = chars.clone();
    let mut hashes = 0;
    while ahead.next_if_eq(&'#').is_some() {
        hashes += 1;
    }
    if ahead.next_if_eq(&'"').is_none() {
        code.push('r');
        return;
    }
    *chars = ahead;
    while let Some(c) = chars.next() {
        keep_line_break(code, c);
        if c == '"' && (0..hashes).all(|_| chars.next_if_eq(&'#').is_some()) {
            break;
        }
    }
}

fn keep_line_break(code: &mut String, c: char) {
    if c == '\n' {
        code.push(c);
    }
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
        assert!(!is_allowed(Path::new("proxy-agent/src/node/sys.rs")));
        assert!(!is_allowed(Path::new("tests/src/lab/netns.rs")));
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
