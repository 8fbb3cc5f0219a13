//! Tables and lines for people. Their text comes from others, also from manifests: it stays on its line, and has no
//! effect on the terminal.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};

/// Width of the widest column of a table.
pub(crate) const CELL_MAX: usize = 80;

/// Writes a table to `out`, which is standard output or stands for it. Columns are as wide as their widest cell, but
/// not wider than [`CELL_MAX`]; the last column is not padded. A wider cell is cut for a terminal, and printed whole
/// elsewhere; other cells are not padded to its width.
pub(crate) fn table<const N: usize>(
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
    out: &mut impl Write,
) -> io::Result<()> {
    write_table(head, rows, io::stdout().is_terminal(), out)
}

/// Writes a table. Wide cells are cut if `cut`.
///
/// # Errors
///
/// When the reader of the output is gone.
pub(crate) fn write_table<const N: usize>(
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
    cut: bool,
    out: &mut impl Write,
) -> io::Result<()> {
    let head = std::iter::once(head.map(str::to_owned));
    let rows: Vec<[String; N]> = head.chain(rows.map(|row| row.map(|cell| printable(&cell)))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().min(CELL_MAX).max(*width);
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths).enumerate().map(|(i, (cell, width))| {
            match cell.char_indices().nth(CELL_MAX) {
                Some(_) if cut && i + 1 < N => cell.chars().take(CELL_MAX - 1).chain(['…']).collect(),
                Some(_) => cell.clone(),
                None => format!("{cell:<width$}"),
            }
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// Writes a line.
///
/// # Errors
///
/// When the reader of the output is gone.
pub(crate) fn line(out: &mut impl Write, text: fmt::Arguments<'_>) -> io::Result<()> {
    writeln!(out, "{}", printable(&text.to_string()))
}

/// Returns the text with ends of lines, and everything else that a terminal acts on, as escapes.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => printable.push(c),
            _ => printable.extend(c.escape_debug()),
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_cells_are_cut_for_a_terminal_and_never_padded() {
        let wide = "10.64.1.11:8080 ".repeat(5_000);
        let table = |cut| {
            let rows = [
                ["a".to_owned(), wide.clone(), wide.clone()],
                ["b".to_owned(), "c".to_owned(), String::new()],
            ];
            let mut out = Vec::new();
            write_table(["ONE", "TWO", "THREE"], rows.into_iter(), cut, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let whole = table(false);
        assert_eq!(whole.matches("10.64.1.11:8080").count(), 10_000);
        assert_eq!(whole.lines().nth(2), Some("b    c"));
        let cut = format!("a    {}…  {}", &wide[..CELL_MAX - 1], wide.trim_end());
        assert_eq!(table(true).lines().nth(1), Some(cut.as_str()));
    }

    #[test]
    fn a_name_makes_no_line_and_tells_the_terminal_nothing() {
        let name = "a\nagent:     running\r\u{1b}[2J\u{9b}1m\t\u{202e}\0";
        let shown = r"a\nagent:     running\r\u{1b}[2J\u{9b}1m\t\u{202e}\0";
        let mut out = Vec::new();
        let row = [name.to_owned(), r#"\ "b" 'c' é 服务"#.to_owned()];
        write_table(["NAME", "TEXT"], [row].into_iter(), true, &mut out).unwrap();
        line(&mut out, format_args!("{name}: {}", 7)).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines, [format!(r#"{shown}  \ "b" 'c' é 服务"#), format!("{shown}: 7")]);
    }
}
