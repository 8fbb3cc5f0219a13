//! Cases with one check made wrong, by which a runner shows that it notices a wrong result.

use super::{Case, Check, Connect, Expect, Frontend, Proto};

/// Returns copies of `case` that each have one wrong check, each with that check.
pub fn falsified(case: &Case) -> Vec<(Case, Check)> {
    let mut all = Vec::new();
    for (number, step) in case.steps.iter().enumerate() {
        for place in 0..step.checks.len() {
            let mut wrong = case.clone();
            let check = &mut wrong.steps[number].checks[place];
            falsify(check);
            let check = check.clone();
            all.push((wrong, check));
        }
    }
    all
}

fn falsify(check: &mut Check) {
    match check {
        Check::Connect(Connect { expect, .. })
        | Check::Open(_, Connect { expect, .. })
        | Check::Say(_, expect) => match expect {
            Expect::Spread(targets, _) => {
                if targets.pop_last().is_some() && targets.is_empty() {
                    *expect = Expect::Reject;
                }
            }
            Expect::Reject => *expect = Expect::Drop,
            Expect::Drop => *expect = Expect::Pass,
            // A single client would not miss an endpoint.
            Expect::Sticky(..) | Expect::Pass => *expect = Expect::Reject,
        },
        Check::Frontends(_, frontends) => {
            if frontends.pop_first().is_none() {
                frontends.insert(Frontend::NodePort(Proto::Tcp, 31080));
            }
        }
        Check::ClusterSet(_, endpoints) => *endpoints += 1,
        Check::AffinitySeconds(_, seconds) => *seconds += 1,
    }
}
