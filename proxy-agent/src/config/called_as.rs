//! Names by which the program can be called: its own, and the names that manifests use for the programs in
//! kube-proxy's image.
//!
//! | name | what it does |
//! |---|---|
//! | `kube-proxy` | without arguments it runs, as kube-proxy does; otherwise as `proxy-agent` |
//! | `go-runner`, `kube-log-runner` | takes that program's flags, then acts as the program named after them |
//!
//! go-runner starts a program and writes its output to a file. This image has one process, and its log goes to
//! stderr.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Flags of go-runner that have no effect here; `true` for those whose value may be the next argument.
const RUNNER_FLAGS: [(&str, bool); 6] = [
    ("log-file", true),
    ("log-file-size", true),
    ("log-file-age", true),
    ("flush-interval", true),
    ("also-stdout", false),
    ("redirect-stderr", false),
];

/// Translates a command line, which begins with the name by which the program was called, into one of `proxy-agent`.
///
/// # Errors
///
/// A message about the part of the command line that is for go-runner.
pub(crate) fn command_line(mut args: Vec<OsString>) -> Result<Vec<OsString>, String> {
    if is_called(&args, &["go-runner", "kube-log-runner"]) {
        args = after_runner(args)?;
    }
    if is_called(&args, &["kube-proxy"]) && args.len() == 1 {
        args.push("run".into());
    }
    Ok(args)
}

fn is_called(args: &[OsString], names: &[&str]) -> bool {
    let name = args.first().and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| names.iter().any(|known| name == OsStr::new(known)))
}

/// Returns the command line that go-runner would start. go-runner's flags follow Go's rules: one dash or two, and
/// `--` ends them.
fn after_runner(args: Vec<OsString>) -> Result<Vec<OsString>, String> {
    let mut args = args.into_iter().skip(1).peekable();
    while let Some(arg) = args.next_if(|arg| arg.to_string_lossy().starts_with('-')) {
        let text = arg.to_string_lossy();
        let flag = text.trim_start_matches('-');
        if flag.is_empty() {
            break;
        }
        let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
        match RUNNER_FLAGS.iter().find(|(known, _)| *known == name) {
            Some((_, true)) if value.is_none() => drop(args.next()),
            Some(_) => {}
            None => {
                return Err(format!(
                    "go-runner has no flag {text}; give kube-proxy's after the program's name"
                ));
            }
        }
    }
    let rest: Vec<OsString> = args.collect();
    if is_called(&rest, &["kube-proxy", "proxy-agent"]) {
        return Ok(rest);
    }
    let named = rest.first().map_or("nothing".into(), |program| program.to_string_lossy());
    Err(format!("go-runner is to start {named}; in this image there is only /usr/local/bin/kube-proxy"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(args: &[&str]) -> Result<Vec<String>, String> {
        let args = command_line(args.iter().map(OsString::from).collect())?;
        Ok(args.into_iter().map(|arg| arg.into_string().unwrap()).collect())
    }

    #[test]
    fn every_name_leads_to_the_same_arguments() {
        let flags = ["--config=/c", "--hostname-override=n1"];
        for (before, program) in [
            (&["proxy-agent"][..], "proxy-agent"),
            (&["/usr/local/bin/kube-proxy"], "/usr/local/bin/kube-proxy"),
            (&["/go-runner", "kube-proxy"], "kube-proxy"),
            (&["/go-runner", "--log-file=/l", "--also-stdout", "/usr/bin/kube-proxy"], "/usr/bin/kube-proxy"),
            (
                &[
                    "/go-runner",
                    "-log-file",
                    "/l",
                    "--also-stdout=false",
                    "--redirect-stderr",
                    "--",
                    "/proxy-agent",
                ],
                "/proxy-agent",
            ),
            (&["kube-log-runner", "--log-file-size=1Gi", "-flush-interval=5s", "kube-proxy"], "kube-proxy"),
        ] {
            let given: Vec<&str> = before.iter().chain(&flags).copied().collect();
            assert_eq!(line(&given).unwrap(), [program, flags[0], flags[1]], "{given:?}");
        }
    }

    #[test]
    fn kube_proxy_runs_without_arguments_and_proxy_agent_explains_itself() {
        assert_eq!(line(&["/usr/local/bin/kube-proxy"]).unwrap(), ["/usr/local/bin/kube-proxy", "run"]);
        assert_eq!(line(&["/go-runner", "kube-proxy"]).unwrap(), ["kube-proxy", "run"]);
        assert_eq!(line(&["proxy-agent"]).unwrap(), ["proxy-agent"]);
        assert_eq!(line(&["kube-proxy", "--help"]).unwrap(), ["kube-proxy", "--help"]);
        assert_eq!(line(&["kube-proxy", "status"]).unwrap(), ["kube-proxy", "status"]);
        assert!(line(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_go_runner_cannot_do_is_said() {
        for (given, said) in [
            (&["/go-runner"][..], "start nothing"),
            (&["/go-runner", "--log-file=/l"], "start nothing"),
            (&["/go-runner", "--log-file", "/l", "--"], "start nothing"),
            (&["/go-runner", "/bin/sh", "-c", "exec kube-proxy"], "start /bin/sh"),
            (&["/go-runner", "--v=2", "kube-proxy"], "no flag --v=2"),
        ] {
            let error = line(given).unwrap_err();
            assert!(error.contains(said), "{given:?}: {error}");
        }
    }
}
