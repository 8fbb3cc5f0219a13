//! The output of the commands.

use crate::config::args::Output;
use serde_json::Value;

/// Prints in each format and checks the output: lines of a table, and the same data as JSON and as YAML.
pub(super) fn printed<E: std::fmt::Debug>(print: impl Fn(Output, &mut Vec<u8>) -> Result<(), E>) {
    let [table, json, yaml] = [Output::Table, Output::Json, Output::Yaml].map(|output| {
        let mut out = Vec::new();
        print(output, &mut out).expect("memory takes everything");
        String::from_utf8(out).expect("it is text")
    });
    lines(&table);
    let json: Value = serde_json::from_str(&json).expect("it is JSON");
    let read: Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| unreachable!("{error}: {yaml}"));
    assert_eq!(read, json, "{yaml}");
}

/// Splits a text into lines, and checks that they contain no characters that control a terminal.
pub(super) fn lines(text: &str) -> Vec<&str> {
    let Some(text) = text.strip_suffix('\n') else { unreachable!("{text:?}") };
    let lines: Vec<&str> = text.split('\n').collect();
    for line in &lines {
        assert!(!line.contains(char::is_control), "{line:?}");
    }
    lines
}
