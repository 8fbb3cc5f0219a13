//! `docs/configuration.md` names every flag and every field, with their defaults, and nothing else.

use std::collections::BTreeMap;

use clap::CommandFactory as _;
use serde_json::Value;

use super::*;
use crate::config::kube_proxy::fields::{plain, values};

const DOCS: &str = include_str!("../../../../../docs/configuration.md");
const NONE: &str = "–";

/// A row of a table.
#[derive(Debug)]
struct Row {
    flag: &'static str,
    fields: Vec<&'static str>,
    default: &'static str,
    without_effect: bool,
}

fn rows() -> Vec<Row> {
    let mut without_effect = false;
    let mut rows = Vec::new();
    for line in DOCS.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            without_effect = title == "Without effect";
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        if let [flag, fields, default, text] = cells[..]
            && (flag == NONE || flag.starts_with("`--"))
        {
            assert!(text.ends_with('.'), "a sentence: {line}");
            let fields = fields
                .split(", ")
                .filter(|field| *field != NONE)
                .map(|cell| cell.trim_matches('`'))
                .collect();
            rows.push(Row {
                flag: flag.trim_matches('`').trim_start_matches('-'),
                fields,
                default,
                without_effect,
            });
        }
    }
    rows
}

fn default_of(value: &Value) -> String {
    if value.is_null() {
        NONE.to_owned()
    } else if value == "" {
        "`\"\"`".to_owned()
    } else {
        format!("`{}`", plain(value))
    }
}

#[test]
fn every_field_is_documented() {
    let defaults = values(&KubeProxyConfiguration::default().with_defaults());
    let mut documented = BTreeMap::new();
    for row in rows() {
        for field in &row.fields {
            assert!(
                documented
                    .insert(*field, (row.flag.replace(NONE, ""), row.default, row.without_effect))
                    .is_none()
            );
        }
    }
    let known = defaults.iter().map(|(field, default)| (field, default_of(default)));
    for (field, default) in known {
        let want = (field.flag.to_owned(), default.as_str(), !field.effect);
        assert_eq!(documented.remove(field.path), Some(want), "{}", field.path);
    }
    assert!(documented.is_empty(), "there are no such fields: {documented:?}");
}

#[test]
fn every_flag_is_documented() {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").unwrap();
    let mut documented: BTreeMap<&str, Row> = BTreeMap::new();
    for row in rows().into_iter().filter(|row| row.flag != NONE) {
        assert!(documented.insert(row.flag, row).is_none());
    }
    for arg in run.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let flag = arg.get_long().unwrap();
        if flag == "help" {
            continue;
        }
        let row = documented.remove(flag).unwrap_or_else(|| panic!("--{flag} is not documented"));
        if row.fields.is_empty() {
            let default = match arg.get_default_values() {
                [] => NONE.to_owned(),
                [default, ..] => format!("`{}`", default.display()),
            };
            assert_eq!(row.default, default, "--{flag}");
        } else {
            assert!(arg.get_default_values().is_empty(), "the default of --{flag} is that of the field");
        }
    }
    assert!(documented.is_empty(), "there are no such flags: {documented:?}");
}

/// Checks that help texts name the same defaults.
#[test]
fn defaults_in_help_texts_are_those_of_the_fields() {
    let defaults = values(&KubeProxyConfiguration::default().with_defaults());
    let cli = Cli::command();
    let mut told = 0;
    for arg in cli.find_subcommand("run").unwrap().get_arguments() {
        let field = defaults.iter().find(|(field, _)| Some(field.flag) == arg.get_long());
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
        if let (Some((field, default)), Some((_, text))) = (field, help.split_once("[default: ")) {
            let text = text.split_once(']').unwrap().0;
            let want = if field.path == "nodePortAddresses" { "primary".to_owned() } else { plain(default) };
            assert_eq!(text, want, "--{}", field.flag);
            told += 1;
        }
    }
    assert!(told >= 7, "{told}");
}
