//! Running other programs: each command line is printed before it starts, and an error names the command that failed.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};

/// Prints a line about what happens next, set off from the output of other programs.
pub(crate) fn say(message: &str) {
    eprintln!("==> {message}");
}

/// Runs `command` with its output going to the terminal.
///
/// # Errors
/// When the command cannot be started or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    eprintln!("  $ {shown}");
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed: {status}");
    }
    Ok(())
}

/// Runs `command` silently and returns what it wrote to standard output.
///
/// # Errors
/// When the command cannot be started or does not succeed; the error contains its standard error output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{shown}`"))?;
    if !out.status.success() {
        bail!("`{shown}` failed: {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    String::from_utf8(out.stdout).with_context(|| format!("`{shown}` wrote something that is not UTF-8"))
}

/// Returns the rest of the line of a program's output that begins with `name`.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// Replaces this process by `command`; returns only when that fails.
///
/// # Errors
/// When the program cannot be started.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    let shown = show(command);
    eprintln!("  $ {shown}");
    Err(anyhow!(command.exec()).context(format!("cannot start `{shown}`")))
}

/// Returns the command line as a person would type it, without the environment and with the bare name of the program.
fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    let mut line = name.into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        line.push(' ');
        if arg.is_empty() || arg.contains([' ', '"', '\'', '(', '*', '$']) {
            line.push_str(&format!("'{}'", arg.replace('\'', r"'\''")));
        } else {
            line.push_str(&arg);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("/usr/bin/cargo");
        command.args(["test", "a b", "it's"]);
        assert_eq!(show(&command), r"cargo test 'a b' 'it'\''s'");
    }

    #[test]
    fn failures_name_the_program_and_carry_its_words() {
        let error =
            output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("broken"), "{error}");
        let error = run(&mut Command::new("/nonexistent/tool")).unwrap_err().to_string();
        assert!(error.contains("cannot start `tool`"), "{error}");
    }
}
