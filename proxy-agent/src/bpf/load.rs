//! Loading programs: the kernel's reason for refusing a program, and the loss without that program.

use std::collections::BTreeMap;
use std::time::Instant;

use aya::VerifierLogLevel;
use aya::programs::ProgramError;

/// Number of lines of the verifier's log that are shown: the log ends with the verdict.
const LAST_LINES: usize = 3;

/// Programs that the kernel has refused, each with the reason and the loss.
pub(crate) type Refused = BTreeMap<&'static str, String>;

/// Returns the level of the verifier's log. The verdict is a few lines. The log of the whole verification is megabytes,
/// and the program would be verified again and again, with a larger buffer each time.
pub(super) fn log_level() -> VerifierLogLevel {
    if tracing::enabled!(tracing::Level::DEBUG) {
        VerifierLogLevel::DEBUG | VerifierLogLevel::STATS
    } else {
        VerifierLogLevel::STATS
    }
}

/// Loads one program by `load`, and logs its name and the time: the verifier may be slow.
pub(super) fn timed<T>(
    program: &'static str,
    load: impl FnOnce() -> Result<T, ProgramError>,
) -> Result<T, ProgramError> {
    tracing::info!(program, "loading BPF program");
    let start = Instant::now();
    let loaded = load();
    match &loaded {
        Ok(_) => tracing::debug!(program, took = ?start.elapsed(), "BPF program loaded"),
        Err(error) => {
            tracing::error!(program, took = ?start.elapsed(), reason = reason(error), "BPF program refused");
        }
    }
    loaded
}

/// Returns an error on one line, with the last lines of the verifier's log.
pub(super) fn reason(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return chain(error) };
    let log = verifier_log.to_string();
    tracing::debug!(%log, "the kernel does not load a program");
    format!("the kernel does not load it: {io_error}: {}", verdict(&log))
}

/// Returns the last lines of the verifier's log, without its statistics.
fn verdict(log: &str) -> String {
    const STATISTICS: [&str; 3] = ["processed ", "verification time ", "stack depth "];
    let mut lines: Vec<_> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !STATISTICS.iter().any(|word| line.starts_with(word)))
        .collect();
    let last = lines.split_off(lines.len().saturating_sub(LAST_LINES));
    if last.is_empty() { "without a reason".to_owned() } else { last.join("; ") }
}

/// Returns the reason why a program is not loaded, and the loss.
pub(super) fn describe(program: &str, error: &ProgramError) -> String {
    format!("{}; without it, {}", reason(error), lost(program))
}

/// Returns the loss while a program is not loaded.
fn lost(program: &str) -> &'static str {
    match program {
        "sock_release" => {
            "closed sockets keep their place in STREAMS, so more of the open ones use socket storage"
        }
        "getpeername4" | "getpeername6" => {
            "getpeername() answers with the pod's address instead of the Service's"
        }
        "recvmsg4" | "sendmsg4" => {
            "unconnected UDP sockets of IPv4 are served in packets, those of the host not at all"
        }
        "recvmsg6" | "sendmsg6" => {
            "unconnected UDP sockets of IPv6 are served in packets, those of the host not at all"
        }
        "connect4" => "no socket is served",
        "connect6" => "connections of IPv6 sockets are served in packets, those of the host not at all",
        "edge_ingress" | "edge_egress" => "clients outside of this node are not served",
        "pod_ingress" | "pod_egress" => "pods are served at their sockets only",
        _ => "nothing is known",
    }
}

/// Returns an error with its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::{dataplane, tc};

    #[test]
    fn the_verdict_is_told_without_statistics() {
        let log = "combined stack size of 4 calls is 544. Too large\n\
                   verification time 5 usec\nstack depth 328+160+0\nprocessed 13675 insns (limit 1000000)\n";
        assert_eq!(verdict(log), "combined stack size of 4 calls is 544. Too large");
        assert_eq!(verdict("1\n2\n\n3\n4\nprocessed 4 insns"), "2; 3; 4");
        assert_eq!(verdict(""), "without a reason");
    }

    #[test]
    fn it_is_known_what_each_program_is_for() {
        for program in dataplane::PROGRAMS.iter().chain(&tc::PROGRAMS) {
            assert_ne!(lost(program), lost("no program"), "{program}");
        }
    }
}
