//! Reads the output of a kernel's console and judges it. A missing row or line is a failure.

use std::collections::BTreeMap;

/// Prefix of the ring's own messages about a boot.
pub(super) const FAILED: &str = "ring: failed: ";

/// Sections of the rows, each booted by itself. The first has most rows. The second has the rows of an agent's life,
/// and some of the others once more with the other layout of cgroups. The two take about the same time, and run side by
/// side where there are processors for it.
pub(super) const SECTIONS: [&str; 2] = ["unified", "hybrid"];

/// Result of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Ok,
    /// The row failed, for this reason.
    Failed(String),
    /// The kernel lacks this, and the rest of the row passed.
    Lacks(String),
}

/// The rows of one section, in the order of the output.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Section {
    /// Id and result of each row.
    pub(super) rows: Vec<(String, End)>,
    /// Exit code of the program that runs the rows.
    exit: Option<i32>,
    /// Whether the section's last line was printed.
    closed: bool,
}

/// Everything read from one console.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Console {
    pub(super) sections: BTreeMap<String, Section>,
    /// Verified instructions of each program: the largest number that was printed.
    pub(super) instructions: BTreeMap<String, u64>,
    /// Lines of the kernel, or of the ring, that report an error.
    troubles: Vec<String>,
    /// Whether the console's output came to its end.
    done: bool,
}

impl Console {
    /// Merges this console with that of another boot of the same kernel.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.sections.extend(other.sections);
        for (program, count) in other.instructions {
            let most = self.instructions.entry(program).or_default();
            *most = count.max(*most);
        }
        self.troubles.extend(other.troubles);
        self.done &= other.done;
        self
    }
}

/// Returns whether a line is shown while the kernel runs. The log has all lines.
pub(super) fn is_news(line: &str) -> bool {
    !line.starts_with("dmesg: ") || trouble(line).is_some()
}

/// Parses the output of a console.
pub(super) fn read(said: &str) -> Console {
    let mut console = Console::default();
    let mut section = None::<String>;
    for line in said.lines().map(str::trim_end) {
        if let Some(trouble) = trouble(line) {
            console.troubles.push(trouble.to_owned());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let current = section.as_ref().map(|name| console.sections.entry(name.clone()).or_default());
        match words.as_slice() {
            ["ring:", _, "s:", "begin", name] => {
                section = Some((*name).to_owned());
                console.sections.entry((*name).to_owned()).or_default();
            }
            ["ring:", _, "s:", "end", code] => {
                if let Some(current) = current {
                    current.exit = code.parse().ok();
                }
                section = None;
            }
            ["ring:", _, "s:", "done", _] => console.done = true,
            ["row", id, rest @ ..] => {
                if let (Some(current), Some(end)) = (current, end_of(rest)) {
                    current.rows.push(((*id).to_owned(), end));
                }
            }
            ["rows:", ..] => {
                if let Some(current) = current {
                    current.closed = true;
                }
            }
            ["insns", program, count] => {
                if let Ok(count) = count.parse::<u64>() {
                    let most = console.instructions.entry((*program).to_owned()).or_default();
                    *most = count.max(*most);
                }
            }
            _ => {}
        }
    }
    console
}

fn end_of(words: &[&str]) -> Option<End> {
    match words {
        ["ok", ..] => Some(End::Ok),
        ["FAILED", _seconds, why @ ..] => Some(End::Failed(why.join(" "))),
        ["lacks", what @ ..] => Some(End::Lacks(what.join(" "))),
        _ => None,
    }
}

/// Returns the error that a line reports, if no healthy run prints such a line.
fn trouble(line: &str) -> Option<&str> {
    if let Some(failed) = line.strip_prefix(FAILED) {
        return Some(failed);
    }
    // A kernel message has the form `[    1.234567] text`, after the prefix of the messages shown at the end.
    let message = line.strip_prefix("dmesg: ").unwrap_or(line).strip_prefix('[')?.split_once("] ")?.1;
    let bad = ["Kernel panic", "BUG: ", "WARNING: ", "Oops: ", "Internal error", "Unable to handle kernel"];
    let bad = bad.iter().any(|bad| message.starts_with(bad));
    (bad || message.contains("general protection fault")).then_some(message)
}

/// Verdict on one boot.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Number of rows that are as expected.
    pub(super) passed: usize,
    /// Failures, one sentence each.
    pub(super) failures: Vec<String>,
    /// Features that the kernel lacks, each once.
    pub(super) lacks: Vec<String>,
}

/// Judges a console: each section must have exactly its rows, all of them passed.
pub(super) fn judge(console: &Console, expected: &[(&str, Vec<String>)]) -> Verdict {
    let mut verdict = Verdict::default();
    verdict.failures.extend(console.troubles.iter().cloned());
    if !console.done {
        verdict.failures.push("the kernel did not come to its end".to_owned());
    }
    for (name, expected) in expected.iter().filter(|(_, rows)| !rows.is_empty()) {
        let none = Section::default();
        let section = console.sections.get(*name).unwrap_or(&none);
        let mut missing = Vec::new();
        for id in expected {
            let mut ends = section.rows.iter().filter(|(row, _)| row == id).map(|(_, end)| end);
            match (ends.next(), ends.next()) {
                (None, _) => missing.push(id.as_str()),
                (Some(_), Some(_)) => verdict.failures.push(format!("{name}: row {id} came twice")),
                (Some(End::Failed(why)), None) => verdict.failures.push(format!("{name}: row {id}: {why}")),
                (Some(End::Lacks(what)), None) => {
                    verdict.passed += 1;
                    if !verdict.lacks.contains(what) {
                        verdict.lacks.push(what.clone());
                    }
                }
                (Some(End::Ok), None) => verdict.passed += 1,
            }
        }
        if !missing.is_empty() {
            verdict.failures.push(format!("{name}: missing: {}", missing.join(", ")));
        }
        for (id, _) in section.rows.iter().filter(|(id, _)| !expected.contains(id)) {
            verdict.failures.push(format!("{name}: row {id} is none that is expected"));
        }
        match section.exit {
            Some(0) if section.closed => {}
            Some(0) => verdict.failures.push(format!("{name}: the rows have no last line")),
            Some(code) => verdict.failures.push(format!("{name}: the rows ended with exit code {code}")),
            None => verdict.failures.push(format!("{name}: the rows did not end")),
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[    0.5] Linux version 6.1\r\n\
        ring: 4.10 s: begin unified\nrow load ok 3.2 every program\nrow tcx lacks no TCX: clsact\n\
        insns edge_ingress 1000\nrows: 2 passed, 0 failed\nring: 9.00 s: end 0\n\
        ring: 9.10 s: begin hybrid\nrow load ok 3.2 every program\nrow tcx lacks no TCX: clsact\n\
        insns edge_ingress 900\nrows: 2 passed, 0 failed\nring: 12.00 s: end 0\n\
        dmesg: [    3.1] Spectre V2 : WARNING: words\nring: 12.50 s: done 0\n";

    fn expected() -> [(&'static str, Vec<String>); 2] {
        ["unified", "hybrid"].map(|section| (section, vec!["load".into(), "tcx".into()]))
    }

    fn failures(said: &str) -> Vec<String> {
        judge(&read(said), &expected()).failures
    }

    #[test]
    fn a_good_run_passes_with_what_it_lacks() {
        let console = read(GOOD);
        assert!(console.done);
        assert_eq!(console.instructions["edge_ingress"], 1000);
        let verdict = judge(&console, &expected());
        let lacks = vec!["no TCX: clsact".to_owned()];
        assert_eq!(verdict, Verdict { passed: 4, failures: Vec::new(), lacks });
    }

    #[test]
    fn two_boots_are_judged_as_one_kernel() {
        let (one, other) = GOOD.split_at(GOOD.find("ring: 9.10").unwrap());
        let end = "ring: 9.05 s: done 0\n";
        assert_eq!(judged(&format!("{one}{end}"), other), [""; 0]);
        assert_eq!(judged(one, other), ["the kernel did not come to its end"]);
        let console = read(&format!("{one}{end}")).and(read(other));
        assert_eq!(console.instructions["edge_ingress"], 1000);
        let oops = format!("{other}[   12.3] BUG: no\n");
        assert_eq!(judged(&format!("{one}{end}"), &oops), ["BUG: no"]);
    }

    fn judged(one: &str, other: &str) -> Vec<String> {
        judge(&read(one).and(read(other)), &expected()).failures
    }

    #[test]
    fn a_missing_a_failed_a_doubled_and_a_strange_row_are_failures() {
        check("row load ok 3.2 every program\n", "", &["unified: missing: load"]);
        check("row load ok 3.2 every", "row load FAILED 3.2 no", &["unified: row load: no program"]);
        check("row load ok 3.2 every program\n", "row load perhaps\n", &["unified: missing: load"]);
        check("row tcx", "row load ok 1 again\nrow tcx", &["unified: row load came twice"]);
        check("row tcx", "row new ok 1 what\nrow tcx", &["unified: row new is none that is expected"]);
    }

    fn check(from: &str, to: &str, expected: &[&str]) {
        assert_eq!(failures(&GOOD.replacen(from, to, 1)), expected, "{to}");
    }

    #[test]
    fn an_end_that_is_missing_or_bad_is_a_failure() {
        let cut = &GOOD[..GOOD.find("ring: 12.00").unwrap()];
        assert_eq!(failures(cut), ["the kernel did not come to its end", "hybrid: the rows did not end"]);
        let code = GOOD.replacen("end 0", "end 101", 1);
        assert_eq!(failures(&code), ["unified: the rows ended with exit code 101"]);
        let open = GOOD.replacen("rows: 2 passed, 0 failed\n", "", 1);
        assert_eq!(failures(&open), ["unified: the rows have no last line"]);
        assert_eq!(failures("").len(), 5);
        let mut expected = expected();
        expected[1].1.clear();
        assert!(judge(&read(&GOOD.replace("begin hybrid", "begin nothing")), &expected).failures.is_empty());
    }

    #[test]
    fn an_oops_a_warning_and_a_timeout_are_failures() {
        for (line, expected) in [
            ("[   12.3] BUG: kernel NULL pointer dereference", "BUG: kernel NULL pointer dereference"),
            ("dmesg: [   12.3] WARNING: CPU: 0 PID: 1 at x.c:1", "WARNING: CPU: 0 PID: 1 at x.c:1"),
            ("[   12.3] Kernel panic - not syncing", "Kernel panic - not syncing"),
            ("ring: failed: ended after 900 s", "ended after 900 s"),
        ] {
            assert_eq!(failures(&format!("{GOOD}{line}\n")), [expected]);
        }
        assert!(failures(&format!("{GOOD}the kernel says [1] WARNING: no message\n")).is_empty());
    }

    #[test]
    fn kernel_messages_of_the_end_are_shown_only_if_bad() {
        assert!(is_news("row load ok"));
        assert!(!is_news("dmesg: [    1.0] Linux version"));
        assert!(is_news("dmesg: [    1.0] Kernel panic - not syncing"));
    }
}
