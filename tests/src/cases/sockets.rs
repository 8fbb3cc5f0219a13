//! Deviations of the socket edge from the table, where no packet edge follows, and the reasons.

use super::checks::parse;
use super::{Case, Check, Connect};

/// A check with a different result.
struct Deviation {
    /// Id of the case.
    case: &'static str,
    /// The check with its actual result, in the syntax of [`parse`].
    instead: &'static str,
    /// Reason, read by people only.
    #[expect(dead_code, reason = "the reader of this table wants to know")]
    because: &'static str,
}

const DEVIATIONS: [Deviation; 2] = [
    Deviation {
        case: "P145",
        instead: "P>10.96.0.10/ping = PASS",
        because: "ping has no port that a Service could have: the hooks leave such sockets alone",
    },
    Deviation {
        case: "P156",
        instead: "P>VIP = DROP",
        because: "a socket has no source address yet when it connects: unless the ranges contain every pod, all pods \
                  are refused",
    },
];

impl Case {
    /// Returns the case for the socket edge alone: checks with another result there, of senders whose sockets it sees,
    /// are replaced.
    pub fn on_sockets(mut self) -> Self {
        for deviation in DEVIATIONS.iter().filter(|deviation| deviation.case == self.id) {
            let instead = parse(deviation.instead).expect("a check in the table of deviations");
            for check in self.steps.iter_mut().flat_map(|step| &mut step.checks) {
                if let Some(instead) = instead.iter().find(|instead| same_connections(instead, check)) {
                    *check = instead.clone();
                }
            }
        }
        self
    }
}

fn same_connections(one: &Check, other: &Check) -> bool {
    match (one, other) {
        (Check::Connect(Connect { sender, dest, .. }), Check::Connect(other)) => {
            (sender, dest) == (&other.sender, &other.dest)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::all;

    #[test]
    fn every_deviation_replaces_one_check_by_another() {
        for case in all() {
            let (before, after) = (checks(&case), checks(&case.clone().on_sockets()));
            let replaced: Vec<_> =
                before.iter().zip(&after).filter(|(before, after)| before != after).collect();
            let listed = DEVIATIONS.iter().filter(|deviation| deviation.case == case.id).count();
            assert_eq!(replaced.len(), listed, "{}: {replaced:?}", case.id);
            for (before, _) in replaced {
                assert!(
                    matches!(before, Check::Connect(c) if c.sender.on_this_node()),
                    "{}: {before:?}",
                    case.id
                );
            }
        }
        assert!(DEVIATIONS.iter().all(|deviation| all().iter().any(|case| case.id == deviation.case)));
    }

    fn checks(case: &Case) -> Vec<Check> {
        case.steps.iter().flat_map(|step| step.checks.clone()).collect()
    }
}
