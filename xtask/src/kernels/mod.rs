//! `test kernels`: boots Debian's cloud kernels in QEMU and checks that every row passes on each.
//!
//! The rows are a program of crate `tests`, `kernel-rows`, which runs in the kernel with the agent. This module fetches
//! the kernels ([`apt`]), packs the programs and tools ([`initramfs`]), starts the kernels ([`boot`]), and judges their
//! output ([`verdict`], [`budget`], [`report`]).

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

pub(crate) mod apt;

mod boot;

mod budget;

mod initramfs;

pub(crate) mod machine;

mod report;

mod rows;

mod verdict;

use machine::Machine;

use crate::process::say;
use crate::target::Target;
use crate::{build, rings, setup};
use apt::Apt;
use budget::Budget;
use initramfs::{Image, Programs};
use machine::{Arch, Kernel, dir};
use report::Outcome;
use rows::LIFETIME;
use verdict::{Console, SECTIONS};

/// Arguments of `test kernels`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernels (`5.10`, `6.1`, `6.12`, `newest` or `all`; default: all), then filters: only rows whose name contains
    /// one of them run.
    #[arg(value_name = "[KERNEL] [FILTER]")]
    kernels_and_filters: Vec<String>,
    /// The machine. One of another architecture is emulated.
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Use the development binaries that the other tests have built, and this machine's libraries, instead of the
    /// static release binaries. The BPF programs are the same.
    #[arg(long)]
    dev: bool,
    /// Rewrite the committed results from this run: the budget of verified instructions, the names of the rows, and
    /// after a full run README's table.
    #[arg(long)]
    bless: bool,
}

/// One kernel on one machine, ready to be started.
struct Job {
    kernel: Kernel,
    machine: Machine,
    version: String,
    image: PathBuf,
    initramfs: PathBuf,
    kvm: bool,
}

/// Fetches the kernels, boots them and judges their output.
///
/// # Errors
/// When something is missing, a build fails, or a row does not end as expected.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (kernels, filters) = split(&args.kernels_and_filters);
    let machines = match args.arch {
        Some(arch) => arch.machines(),
        None => vec![Machine::host()?],
    };
    ensure!(!args.bless || filters.is_empty(), "--bless needs every row: leave the filters out");
    ensure!(
        !args.dev || machines.iter().all(|machine| Machine::host().is_ok_and(|host| host == *machine)),
        "development binaries run on this machine's architecture only: leave --dev out"
    );
    let mut expected = rows::Names::load()?;
    let mut budget = Budget::load()?;
    setup::kernels(&machines, setup::quiet)?;
    let mut jobs = Vec::new();
    for machine in &machines {
        let programs = programs(*machine, args.dev)?;
        let kvm = boot::has_kvm(*machine);
        say(&format!("{machine}: {}", if kvm { "with KVM" } else { "emulated, without KVM" }));
        let tools = Apt::update(initramfs::TOOLS_SUITE, *machine)?.tools(&initramfs::TOOLS_PACKAGES)?;
        for kernel in &kernels {
            jobs.push(prepare(*kernel, *machine, kvm, &tools, &programs)?);
        }
    }

    let mut sections = SECTIONS.map(|section| (section, expected.of(section, filters)));
    if filters.is_empty() {
        // Runs also the rows whose names are not committed yet.
        sections[0].1 = LIFETIME.map(|part| format!("--without={part}")).into();
        sections[1].1.extend(LIFETIME.map(str::to_owned));
    }
    let mut outcomes = boot_all(&jobs, &sections)?;
    if args.bless {
        expected.bless(&outcomes);
        expected.store()?;
        for outcome in &outcomes {
            budget.bless(outcome.kernel, &outcome.console.instructions)?;
        }
        budget.store()?;
    }
    let sections = SECTIONS.map(|section| (section, expected.of(section, filters)));
    for outcome in &mut outcomes {
        outcome.verdict = verdict::judge(&outcome.console, &sections);
        // A filter may leave out the row that reports the instructions.
        if filters.is_empty() {
            outcome.verdict.failures.extend(budget.check(outcome.kernel, &outcome.console.instructions));
        }
    }
    outcomes.sort_by_key(|outcome| (outcome.machine, outcome.kernel));
    report::print(&outcomes, args.dev);
    let full = filters.is_empty() && !args.dev && outcomes.len() == Kernel::ALL.len() * 2;
    let mut failed: usize = outcomes.iter().map(|outcome| outcome.verdict.failures.len()).sum();
    if full && failed == 0 && !report::readme(&outcomes, args.bless)? {
        say(
            "README.md's table of kernels is not what this run gave: `cargo xtask test kernels all --arch all --bless` writes it",
        );
        failed += 1;
    }
    let passed: usize = outcomes.iter().map(|outcome| outcome.verdict.passed).sum();
    println!("kernels: {passed} passed, {failed} failed");
    ensure!(passed + failed > 0, "no row ran: none matches {filters:?}");
    if failed > 0 {
        bail!("the ring of kernels failed; the whole consoles are in {}", dir().join("logs").display());
    }
    Ok(())
}

/// Splits the kernels off the front of the arguments.
fn split(args: &[String]) -> (Vec<Kernel>, &[String]) {
    let mut kernels = Vec::new();
    let mut rest = args;
    while let Some((named, after)) =
        rest.split_first().and_then(|(word, after)| Some((Kernel::named(word)?, after)))
    {
        kernels.extend(named);
        rest = after;
    }
    if kernels.is_empty() {
        kernels = Kernel::ALL.to_vec();
    }
    kernels.sort();
    kernels.dedup();
    (kernels, rest)
}

/// Builds the programs that run in the kernel.
fn programs(machine: Machine, dev: bool) -> Result<Programs> {
    Ok(if dev {
        Programs { dir: rings::development_programs()?, dynamic: true }
    } else {
        Programs {
            dir: build::release(&Target::new(Some(machine.name()))?, build::Programs::Tool("kernel-rows"))?,
            dynamic: false,
        }
    })
}

/// Fetches a kernel and makes its initramfs.
fn prepare(kernel: Kernel, machine: Machine, kvm: bool, tools: &Path, programs: &Programs) -> Result<Job> {
    let apt = Apt::update(kernel.suite(), machine)?;
    let (root, version) = apt.kernel(&format!("linux-image-cloud-{}", machine.debian()))?;
    let image = Image::find(&root)?;
    let archive = dir().join(machine.name()).join(format!("{kernel}.cpio"));
    let missing = initramfs::write_archive(&image, machine, tools, programs, &archive)?;
    let lacks =
        if missing.is_empty() { String::new() } else { format!("; no module {}", missing.join(", ")) };
    say(&format!("{kernel} on {machine}: Debian's {version}{lacks}"));
    Ok(Job { kernel, machine, version, image: image.kernel, initramfs: archive, kvm })
}

/// Output of one boot of a kernel.
struct Booted {
    kernel: usize,
    from: Instant,
    to: Instant,
    console: Console,
    log: PathBuf,
}

/// Boots each kernel with every section, as many at the same time as this machine has processors.
fn boot_all(jobs: &[Job], sections: &[(&str, Vec<String>)]) -> Result<Vec<Outcome>> {
    let logs = dir().join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let parts: Vec<_> = sections.iter().filter(|(_, rows)| !rows.is_empty()).collect();
    let todo: VecDeque<_> =
        (0..jobs.len()).flat_map(|job| parts.iter().map(move |part| (job, *part))).collect();
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let workers = processors.min(todo.len());
    let (todo, booted) = (Mutex::new(todo), Mutex::new(Vec::new()));
    let next = || todo.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<()> {
        while let Some((kernel, section)) = next() {
            let job = &jobs[kernel];
            let name = format!("{} {} {}", job.kernel, job.machine, section.0);
            let log = logs.join(format!("{}-{}-{}.log", job.kernel, job.machine, section.0));
            let from = Instant::now();
            let said = boot::boot(&boot::Boot {
                name: &name,
                machine: job.machine,
                kernel: &job.image,
                initramfs: &job.initramfs,
                kvm: job.kvm,
                log: &log,
                section,
            })?;
            let done = Booted { kernel, from, to: Instant::now(), console: verdict::read(&said), log };
            booted.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().ok().context("a worker of the ring panicked")?)
    })?;
    let mut booted = booted.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut outcomes = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        let boots: Vec<Booted> = booted.extract_if(.., |boot| boot.kernel == number).collect();
        let from = boots.iter().map(|boot| boot.from).min();
        let to = boots.iter().map(|boot| boot.to).max();
        outcomes.push(Outcome {
            kernel: job.kernel,
            machine: job.machine,
            version: job.version.clone(),
            seconds: from.zip(to).map_or(0, |(from, to)| (to - from).as_secs()),
            logs: boots.iter().map(|boot| boot.log.clone()).collect(),
            console: boots.into_iter().map(|boot| boot.console).reduce(Console::and).unwrap_or_default(),
            verdict: verdict::Verdict::default(),
        });
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_come_first_then_filters() {
        check(&[], &Kernel::ALL, &[]);
        check(&["all"], &Kernel::ALL, &[]);
        check(&["newest", "5.10", "newest"], &[Kernel::V5_10, Kernel::Newest], &[]);
        check(&["6.1", "sctp", "6.12"], &[Kernel::V6_1], &["sctp", "6.12"]);
        check(&["load"], &Kernel::ALL, &["load"]);
    }

    fn check(args: &[&str], kernels: &[Kernel], filters: &[&str]) {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let (found, rest) = split(&args);
        assert_eq!(found, kernels);
        assert_eq!(rest, filters);
    }
}
