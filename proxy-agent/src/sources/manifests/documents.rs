//! Documents of a manifest file, and the text between them.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;
use serde_saphyr::{DuplicateKeyPolicy, Error as YamlError, Spanned};

use crate::sources::text::in_utf8;

/// Maximum nesting depth of a document. Objects that are read stay below 20; the schemas beside them do not.
const DEPTH_MAX: usize = 200;
/// Maximum number of documents in one file. Each document costs a parser.
const DOCUMENTS_MAX: usize = 100_000;
/// Maximum number of YAML nodes that the aliases of one file may stand for, divided equally among its documents with
/// aliases. It is ten times the number in an honest file.
const ALIAS_NODES_MAX: usize = 100_000;

/// Maximum number of bytes of one piece of text that are read again because of quoted lines with less indentation than
/// YAML demands. Each such line causes the piece to be read once more.
const INDENTED_BYTES_MAX: usize = 64 << 20;
/// The parser's messages about such lines: with spaces, and with tabs.
const UNDERINDENTED: [&str; 2] =
    ["invalid indentation in multiline quoted scalar", "tab cannot be used as indentation"];

/// Position in a file.
pub(super) struct At {
    pub(super) document: usize,
    pub(super) line: Option<u64>,
    pub(super) item: Option<usize>,
}

/// A document that could be read.
pub(super) struct Document {
    pub(super) value: Value,
    /// Problem to report although the document could be read.
    pub(super) said: Option<String>,
}

/// Callback that takes a document, or the reason why it cannot be read, and its position.
type PassOn<'a> = &'a mut dyn FnMut(Result<Document, String>, &At);

/// Passes on every document of a file: as JSON if both its name and its first character say so, else as YAML.
pub(super) fn documents(path: &Path, text: &[u8], pass_on: PassOn<'_>) {
    let text = in_utf8(text);
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let named_json = path.extension().is_some_and(|extension| extension == "json");
    if named_json && matches!(first, None | Some(b'{' | b'[')) {
        read_json(&text, pass_on);
    } else {
        read_yaml(&text, pass_on);
    }
}

fn read_json(text: &[u8], pass_on: PassOn<'_>) {
    for (i, value) in serde_json::Deserializer::from_slice(text).into_iter::<Value>().enumerate() {
        let document = value.map(|value| Document { value, said: None }).map_err(|error| error.to_string());
        pass_on(document, &At { document: i + 1, line: None, item: None });
    }
}

/// Reads each document by itself, so that a document that cannot be read does not affect the others.
fn read_yaml(text: &[u8], pass_on: PassOn<'_>) {
    let with_aliases = pieces(text).filter(|(_, piece)| piece.contains(&b'*')).count();
    let mut reading = Reading { aliases: ALIAS_NODES_MAX / with_aliases.max(1), number: 0, pass_on };
    for (above, piece) in pieces(text) {
        let before = reading.number;
        let mut text = Cow::Borrowed(piece);
        let mut trial = Trial { skip: 0, last_wins: false, said: None, indented: 0 };
        while let Some(again) = reading.piece(&text, above, &mut trial) {
            trial.skip = reading.number - before;
            match again {
                Again::LastWins(said) => (trial.last_wins, trial.said) = (true, Some(said)),
                Again::Indent(line) => {
                    text = indented(&text, line).into();
                    trial.indented += 1;
                }
            }
        }
        if reading.number > DOCUMENTS_MAX {
            return;
        }
    }
}

struct Reading<'a> {
    aliases: usize,
    /// Number of documents so far.
    number: usize,
    pass_on: PassOn<'a>,
}

/// Settings and progress of reading a piece.
struct Trial {
    /// Number of documents of the piece that have been passed on.
    skip: usize,
    /// Whether the last of duplicate keys counts, and the problem to report about that.
    last_wins: bool,
    said: Option<String>,
    /// Number of lines that have been indented.
    indented: usize,
}

/// Reason to read a piece once more.
enum Again {
    /// A key is duplicate, which is to be reported: the last one counts.
    LastWins(String),
    /// A quoted line is indented less than YAML demands; kubectl accepts it. (White space at its beginning has no
    /// meaning, so the line can be indented.)
    Indent(u64),
}

/// Returns the text with one line indented more than any other.
fn indented(text: &[u8], line: u64) -> Vec<u8> {
    let before = text.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1) as usize);
    let (before, line) = text.split_at(before.map(<[u8]>::len).sum());
    [before, &[b' '; 2 * DEPTH_MAX], line].concat()
}

impl Reading<'_> {
    /// Passes on the documents of a piece; `above` is the number of lines before the piece. Returns the reason to read
    /// the piece once more, if there is one.
    fn piece(&mut self, mut text: &[u8], above: u64, trial: &mut Trial) -> Option<Again> {
        let size = text.len().max(1);
        let duplicate_keys =
            if trial.last_wins { DuplicateKeyPolicy::LastWins } else { DuplicateKeyPolicy::Error };
        // The size of the file bounds the nodes that it spells out; only the nodes that aliases multiply need a limit.
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: DEPTH_MAX,
                max_documents: usize::MAX,
                max_events: usize::MAX,
                max_nodes: usize::MAX,
            },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: self.aliases },
            duplicate_keys: duplicate_keys,
            emit_comments: false,
            with_snippet: false,
        };
        for value in serde_saphyr::read_with_options::<_, Spanned<Value>>(&mut text, options).skip(trial.skip)
        {
            if let Err(error) = &value {
                if matches!(error.without_snippet(), YamlError::DuplicateMappingKey { .. }) {
                    return Some(Again::LastWins(format!("{}: the last one counts", explain(error, above))));
                }
                let said = error.without_snippet().to_string();
                if trial.indented < (INDENTED_BYTES_MAX / size).max(1)
                    && let Some(location) = error.location()
                    && UNDERINDENTED.iter().any(|words| said.contains(words))
                {
                    return Some(Again::Indent(location.line()));
                }
            }
            self.number += 1;
            let mut at = At { document: self.number, line: None, item: None };
            if self.number > DOCUMENTS_MAX {
                let many = format!(
                    "there are more than {DOCUMENTS_MAX} documents, the limit for one file; split it"
                );
                (self.pass_on)(Err(many), &at);
                break;
            }
            match value {
                Ok(value) if value.value.is_null() => {}
                Ok(value) => {
                    at.line = Some(above + value.referenced.line());
                    (self.pass_on)(Ok(Document { value: value.value, said: trial.said.take() }), &at);
                }
                Err(error) => {
                    (self.pass_on)(Err(explain(&error, above)), &at);
                    break;
                }
            }
        }
        None
    }
}

/// Splits the text before each line that begins a document and after each line that ends one; returns each piece with
/// the number of lines above it. Comments and directives before a document belong to its piece; pieces with nothing
/// else are left out.
fn pieces(text: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let (mut rest, mut above) = (text, 0);
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let (mut at, mut lines, mut begun, mut content) = (0, 0, false, false);
            for line in rest.split_inclusive(|byte| *byte == b'\n') {
                let begins = is_line(line, b"---");
                if begins && begun {
                    break;
                }
                (at, lines) = (at + line.len(), lines + 1);
                if is_line(line, b"...") {
                    break;
                }
                // Content may follow the dashes on the same line.
                let text = if begins { line.get(3..).unwrap_or_default() } else { line };
                content |= !matches!(text.trim_ascii_start(), [] | [b'#' | b'%', ..]);
                begun |= begins || content;
            }
            let (piece, behind) = rest.split_at(at);
            let found = (above, piece);
            (rest, above) = (behind, above + lines);
            if content {
                return Some(found);
            }
        }
        None
    })
}

fn is_line(line: &[u8], marker: &[u8; 3]) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.first().is_none_or(u8::is_ascii_whitespace))
}

/// Returns the parser's message, reworded for people who do not know the parser. `above` is the number of lines before
/// the document.
fn explain(error: &YamlError, above: u64) -> String {
    let error = error.without_snippet();
    let place =
        |line| format!("line {line}, column {}", error.location().map_or(0, |location| location.column()));
    let line = error.location().map_or(0, |location| location.line());
    let text = if matches!(error, YamlError::Budget { .. }) {
        format!("{error}; a document may be nested {DEPTH_MAX} levels deep")
    } else if let YamlError::DuplicateMappingKey { key: Some(key), .. } = error {
        format!("the key {key:?} is there twice at {}", place(line))
    } else {
        error.to_string()
    };
    text.replace(&place(line), &place(above + line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_documents_begin_and_end() {
        for (text, want) in [
            ("", vec![]),
            ("# a\n\n", vec![]),
            ("---\n---\n# a\n--- # b\n", vec![]),
            ("a", vec![(0, "a")]),
            ("a\n---\nb\n", vec![(0, "a\n"), (1, "---\nb\n")]),
            ("# a\n---\nb\n", vec![(0, "# a\n---\nb\n")]),
            ("--- a\n---\tb\n---\r\nc", vec![(0, "--- a\n"), (1, "---\tb\n"), (2, "---\r\nc")]),
            ("a\n...\n%YAML 1.2\n---\nb\n...\n", vec![(0, "a\n...\n"), (2, "%YAML 1.2\n---\nb\n...\n")]),
            ("---a\n ---\n", vec![(0, "---a\n ---\n")]),
        ] {
            let found: Vec<_> = pieces(text.as_bytes()).collect();
            let want: Vec<_> = want.into_iter().map(|(above, piece)| (above, piece.as_bytes())).collect();
            assert_eq!(found, want, "{text:?}");
        }
    }

    fn read(text: &str) -> (usize, Vec<String>) {
        let (mut read, mut errors) = (0, Vec::new());
        documents(Path::new("a.yaml"), text.as_bytes(), &mut |document, _| match document {
            Ok(_) => read += 1,
            Err(error) => errors.push(error),
        });
        (read, errors)
    }

    /// go-yaml, and so kubectl, demands no indentation inside of quotes.
    #[test]
    fn quoted_text_is_indented_as_it_likes() {
        for quoted in [
            "'[\n      1\n    ]\n    '",
            "\"{\n      1\n    }\"",
            "\"a\tb\"",
            "\"a\n     \tb\"",
            "\"a\n\tb\"",
            "\"a\nb\n  c\nd\"",
            &format!("\"{}\"", "a\n".repeat(300)),
        ] {
            let text = format!("a:\n  b:\n    c: {quoted}\nd: 1\n");
            assert_eq!(read(&text), (1, vec![]), "{text:?}");
        }
    }

    #[test]
    fn aliases_are_shared_by_documents_that_have_some() {
        let with = "a: &a [1, 2, 3, 4, 5, 6, 7, 8]\nb: *a\n---\n";
        let (read_all, errors) = read(&("c: d\n---\n".repeat(5_000) + &with.repeat(5_000)));
        assert_eq!((read_all, errors), (10_000, vec![]));
        let (none, errors) = read(&with.repeat(20_000));
        assert_eq!((none, errors.len()), (0, 20_000));
    }

    #[test]
    fn documents_are_counted() {
        let (read, errors) = read(&"a: b\n---\n".repeat(DOCUMENTS_MAX + 2));
        assert_eq!((read, errors.len()), (DOCUMENTS_MAX, 1));
        assert!(errors[0].contains("more than 100000 documents"), "{errors:?}");
    }
}
