//! Rust source as the lints read it: files, and code without comments and literals.

use std::fs;
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::str::Chars;

use anyhow::{Context as _, Result};

/// Returns every Rust file below a directory, sorted by path.
///
/// # Errors
/// When a directory cannot be listed.
pub(super) fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
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

/// Returns the source without the contents of comments, strings and characters; line breaks stay.
pub(super) fn blank_comments_and_literals(source: &str) -> String {
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

/// Called after an `r`: skips `"…"` or `#"…"#`; otherwise skips nothing and keeps the `r`.
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
