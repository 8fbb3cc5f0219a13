//! Starts a kernel in QEMU, shows what its console prints, and keeps all of it in a file.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::machine::Machine;
use super::verdict;

/// Time limit for one kernel: many times the time that it takes on two idle cores.
const BOUND_SECONDS: u32 = 1800;

/// One kernel to start.
pub(super) struct Boot<'a> {
    /// Prefix of each line that is shown.
    pub(super) name: &'a str,
    /// The processor.
    pub(super) machine: Machine,
    /// Path of the kernel.
    pub(super) kernel: &'a Path,
    /// Path of its initramfs.
    pub(super) initramfs: &'a Path,
    /// Whether this machine's processor runs the kernel; otherwise the kernel is emulated.
    pub(super) kvm: bool,
    /// File that the console is written to.
    pub(super) log: &'a Path,
    /// Section of the rows, and the arguments (options, parts of names) that select its rows: see init.sh.
    pub(super) section: &'a (&'a str, Vec<String>),
}

/// Runs one kernel until it powers off, fails or has used up its time; returns the output of its console.
///
/// # Errors
/// When QEMU cannot be started, or its output cannot be read or kept.
pub(super) fn boot(boot: &Boot<'_>) -> Result<String> {
    let machine = boot.machine;
    // `timeout` sets the limit: it ends QEMU also when this program has been killed.
    let mut qemu = Command::new("timeout");
    qemu.args(["--foreground", "--kill-after=10", &BOUND_SECONDS.to_string(), machine.qemu().0]);
    qemu.args(machine.board(boot.kvm));
    if boot.kvm {
        qemu.arg("-enable-kvm");
    }
    // One processor: emulated processors that run side by side miss code that the kernel patches at run time, and the
    // kernel dies of an `Oops: int3`.
    qemu.args(["-m", "1500", "-smp", "1", "-nodefaults", "-no-user-config"]);
    qemu.args(["-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(boot.kernel).arg("-initrd").arg(boot.initramfs);
    qemu.arg("-append").arg(command_line(machine, boot.kvm, boot.section));
    let mut log = File::create(boot.log).with_context(|| format!("cannot write {}", boot.log.display()))?;
    // QEMU's own messages go to the log, too.
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

fn command_line(machine: Machine, kvm: bool, (section, rows): &(&str, Vec<String>)) -> String {
    // A panic reboots at once, which ends QEMU. The watchdogs would report a hung processor on a busy host.
    format!(
        "console={} panic=-1 loglevel=5 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on log_buf_len=4M{} \
         ring.{section}={}",
        machine.console(),
        machine.kernel_options(kvm),
        rows.join(",")
    )
}

/// Returns whether KVM can run kernels of `machine` here. A device that opens may still refuse QEMU's requests, for
/// example in a virtual machine without nested virtualisation, so QEMU is asked to prepare a machine and to end.
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

/// Returns whether the processor translates a guest's addresses itself. Otherwise KVM has to translate them, and stops
/// at instructions that it cannot emulate (seen with `kvm_pvm`: 5.10 did not reach its first line of output).
fn has_nested_paging(machine: Machine) -> bool {
    match machine {
        Machine::X86_64 => ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"].iter().any(|parameter| {
            fs::read_to_string(format!("/sys/module/{parameter}"))
                .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        }),
        Machine::Aarch64 => true,
    }
}
