//! The scenarios, by what they are about.

mod changes;
mod cluster;
mod outside;
mod services;

use proxy_tests::lab::Attempt;

const KUBIA: [&str; 3] = ["kubia-7nog1", "kubia-gzwli", "kubia-3inly"];
const LINUXEA: [&str; 3] = ["linuxea-0", "linuxea-1", "linuxea-2"];
/// Enough connections for [`evenly`](proxy_tests::scenarios::evenly).
const MANY: usize = 300;

fn failure(attempt: &Attempt) -> &str {
    attempt.error.as_deref().unwrap_or("answered")
}
