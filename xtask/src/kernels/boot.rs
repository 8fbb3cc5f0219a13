//! Starts a kernel in QEMU, shows what its console says, and keeps all of it in a file.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::machine::Machine;
use super::verdict;

/// How long one kernel may take: many times what it takes on two idle cores.
const BOUND_SECONDS: u32 = 1800;

/// What to start.
pub(super) struct Boot<'a> {
    /// Stands before each line that is shown.
    pub(super) name: &'a str,
    /// The processor.
    pub(super) machine: Machine,
    /// Its kernel.
    pub(super) kernel: &'a Path,
    /// Its initramfs.
    pub(super) initramfs: &'a Path,
    /// Whether this machine's processor runs it; else it is emulated.
    pub(super) kvm: bool,
    /// Where the console goes.
    pub(super) log: &'a Path,
    /// What the rows are run with, and the parts of their names: see init.sh.
    pub(super) section: &'a (&'a str, Vec<String>),
}

/// Runs one kernel until it powers off, fails or has used up its time; returns what its console said.
///
/// # Errors
/// When QEMU cannot be started, or its output cannot be read or kept.
pub(super) fn boot(boot: &Boot<'_>) -> Result<String> {
    let machine = boot.machine;
    // Bound by a program of its own: it ends QEMU also when this one has been killed.
    let mut qemu = Command::new("timeout");
    qemu.args(["--foreground", "--kill-after=10", &BOUND_SECONDS.to_string(), machine.qemu().0]);
    qemu.args(machine.board(boot.kvm));
    if boot.kvm {
        qemu.arg("-enable-kvm");
    }
    // One processor: emulated ones that run side by side miss code that the kernel patches at run time, and it dies of an
    // `Oops: int3`.
    qemu.args(["-m", "1500", "-smp", "1", "-nodefaults", "-no-user-config"]);
    qemu.args(["-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(boot.kernel).arg("-initrd").arg(boot.initramfs);
    qemu.arg("-append").arg(command_line(machine, boot.section));
    let mut log = File::create(boot.log).with_context(|| format!("cannot write {}", boot.log.display()))?;
    // In the log: what QEMU itself says, too.
    let errors = log.try_clone().context("cannot open the log twice")?;
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot start {}", machine.qemu().0))?;
    let mut console = BufReader::new(child.stdout.take().context("QEMU has no output")?);
    let mut said = String::new();
    let mut line = Vec::new();
    while console.read_until(b'\n', &mut line).context("cannot read the console")? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        writeln!(log, "{text}").with_context(|| format!("cannot write {}", boot.log.display()))?;
        if verdict::is_news(text) {
            println!("{:>24} | {text}", boot.name);
        }
        said.push_str(text);
        said.push('\n');
        line.clear();
    }
    let status = child.wait().context("cannot wait for QEMU")?;
    if !status.success() {
        let why = match status.code() {
            Some(124 | 137) => format!("ended after {BOUND_SECONDS} s"),
            _ => format!("QEMU: {status}"),
        };
        said.push_str(&format!("{}{why}\n", verdict::FAILED));
    }
    Ok(said)
}

fn command_line(machine: Machine, (section, rows): &(&str, Vec<String>)) -> String {
    // A panic reboots at once, which ends QEMU. The watchdogs would call a busy host a hung processor.
    format!(
        "console={} panic=-1 loglevel=5 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on log_buf_len=4M \
         ring.{section}={}",
        machine.console(),
        rows.join(",")
    )
}

/// Whether this machine can run that one's instructions itself. A device that opens may still refuse what QEMU asks of it,
/// in a virtual machine without nested virtualisation, say: QEMU is asked to prepare a machine and to end.
pub(super) fn has_kvm(machine: Machine) -> bool {
    if !Machine::host().is_ok_and(|host| host == machine)
        || !has_nested_paging(machine)
        || OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err()
    {
        return false;
    }
    let mut qemu = Command::new("timeout");
    qemu.args(["--kill-after=5", "60", machine.qemu().0]).args(machine.board(true));
    qemu.args(["-enable-kvm", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio"]);
    let child = qemu.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    child.is_ok_and(|mut child| {
        let asked = child.stdin.take().is_some_and(|mut monitor| monitor.write_all(b"quit\n").is_ok());
        child.wait().is_ok_and(|status| asked && status.success())
    })
}

/// Whether the processor translates a guest's addresses itself. Where KVM has to do that, it stops at instructions that it
/// cannot emulate (seen with `kvm_pvm`: 5.10 did not come as far as its first line).
fn has_nested_paging(machine: Machine) -> bool {
    match machine {
        Machine::X86_64 => ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"].iter().any(|parameter| {
            fs::read_to_string(format!("/sys/module/{parameter}"))
                .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        }),
        Machine::Aarch64 => true,
    }
}
