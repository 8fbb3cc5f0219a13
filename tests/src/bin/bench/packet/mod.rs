//! `packet`: time that the programs of the packet edge take for one packet, by the kernel's own test runs.
//!
//! The programs and maps are those of an agent that runs in a lab. Each path through them is first checked packet by
//! packet, then measured. A value is the time of the program alone over that of a fixed reference program in the same
//! round, so that values of different machines can be compared.

mod frame;
mod paths;
mod rig;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::Counter;

use crate::cluster::Cluster;
use crate::cpu;
use crate::outside::{Backend, Ground};
use crate::progress;
use crate::report::{Bar, Figure, Report};
use crate::stats::{Estimate, median_of};
use frame::Frame;
use paths::{Path, Paths};
use rig::{Devices, Program, Rig, Wrapper};

/// Number of instructions after which the verifier gives up.
const VERIFIER_LIMIT: f64 = 1e6;

/// Options of `packet`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Services in the cluster.
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Only paths whose name contains one of these, such as `not ours` or `edge_ingress established v4`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds; in each, every path is measured once.
    #[arg(long, default_value_t = 60)]
    rounds: usize,
    /// Packets of each path in a round.
    #[arg(long, default_value_t = 50_000)]
    repeat: u32,
    /// CPU to run on.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
}

/// Runs the benchmark.
///
/// # Errors
/// If the lab cannot be built, the agent does not start, or a program does not handle a packet as it should.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("packet", format!("{options:?}"));
    let ground = Ground::new()?;
    let node = ground.node();
    let mut cluster = Cluster::start(node)?;
    for ipv6 in [false, true] {
        for backend in Backend::ALL {
            cluster.apply(&ground.service(backend, ipv6)?)?;
        }
    }
    let (world, agent) = cluster.fill(options.services, node)?;
    let world = world.to_string();
    let pins = PinDir::new(node.pin_dir());
    let maps = KernelMaps::open(&pins)?;

    let measured = cpu::on_cpu(options.cpu, || {
        let mut rig = Rig::new(&pins, node.host().net())
            .with_context(|| format!("the agent's log:\n{}", agent.log()))?;
        let mut paths = Paths::of(&mut rig, &ground, false)?;
        paths.extend(Paths::of(&mut rig, &ground, true)?);
        paths.retain(|path| {
            options.only.is_empty() || options.only.iter().any(|part| path.name.contains(part.as_str()))
        });
        let example = reference(&mut rig)?;
        progress(format_args!("{} ways, each walked through once", paths.len()));
        // New flows last: they evict others from caches and tables.
        let (fresh, same): (Vec<Path>, Vec<Path>) =
            paths.into_iter().partition(|path| path.wrapper == Wrapper::Fresh);
        report.figures.extend(measure(&mut rig, &same, &example, options, &world)?);
        let before = maps.counter(Counter::Flow)?;
        report.figures.extend(measure(&mut rig, &fresh, &example, options, &world)?.into_iter().skip(1));
        let flows = maps.counter(Counter::Flow)? - before;
        let packets = fresh.len() as u64 * options.rounds as u64 * u64::from(options.repeat);
        ensure!(flows == packets, "{packets} packets of new clients made {flows} flows");
        Ok(rig.verified)
    })?;
    for program in measured {
        let Some(instructions) = program.instructions else {
            report.notes.push(format!("{}: this kernel does not tell how much it verified", program.name));
            continue;
        };
        let name = format!("{} verified", program.name);
        let figure = Figure::new(name, &world, "instructions", f64::from(instructions))
            .detail("share of the verifier's limit", f64::from(instructions) / VERIFIER_LIMIT);
        report.figures.push(figure.bar(Bar::AtMost(VERIFIER_LIMIT / 2.0)));
    }
    report.machine.end();
    Ok(report)
}

/// Prepares the reference program; returns the packet that it translates.
fn reference(rig: &mut Rig) -> Result<Frame> {
    let example = Frame::syn("203.0.113.7:40000".parse()?, "10.96.0.200:80".parse()?);
    let to = Frame { destination: "10.64.1.11:8080".parse()?, ..example };
    rig.prepare_reference(&example, &to)?;
    let (verdict, out) = rig.feed(Program::Reference, Devices::default(), &example)?;
    ensure!(out == to, "the reference made {out:?} of {example:?}, verdict {verdict}");
    Ok(example)
}

/// One measurement of a round: a path, the reference for comparison, or the overhead of a wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Run {
    Wrapper(Wrapper),
    Reference,
    Path(usize),
}

/// Nanoseconds of one round.
type Round = BTreeMap<Run, f64>;

fn measure(
    rig: &mut Rig,
    paths: &[Path],
    example: &Frame,
    options: &Options,
    world: &str,
) -> Result<Vec<Figure>> {
    let fixed = [Run::Wrapper(Wrapper::Same), Run::Wrapper(Wrapper::Fresh), Run::Reference];
    let mut runs: Vec<Run> = fixed.into_iter().chain((0..paths.len()).map(Run::Path)).collect();
    let mut rounds: Vec<Round> = Vec::new();
    for _ in 0..options.rounds {
        let mut times = Round::new();
        runs.rotate_left(1);
        for &run in &runs {
            let nowhere = Devices::default();
            let (program, wrapper, devices, frame) = match run {
                Run::Wrapper(wrapper) => (Program::Empty, wrapper, nowhere, example),
                Run::Reference => (Program::Reference, Wrapper::Same, nowhere, example),
                Run::Path(index) => {
                    let Path { program, wrapper, devices, frame, .. } = &paths[index];
                    (*program, *wrapper, *devices, frame)
                }
            };
            times.insert(run, rig.time(program, wrapper, devices, frame, options.repeat)?);
        }
        rounds.push(times);
    }
    let reference = |round: &Round| alone(round, Run::Reference, Wrapper::Same);
    let empty = median_of(rounds.iter().filter_map(|round| round.get(&fixed[0]).copied()));
    let mut figures = vec![
        Figure::estimated("reference", world, "ns", Estimate::of(rounds.iter().filter_map(reference)))
            .detail("subtracted ns", empty),
    ];
    for (index, path) in paths.iter().enumerate() {
        let nanos = |round: &Round| alone(round, Run::Path(index), path.wrapper);
        let estimate =
            Estimate::of(rounds.iter().filter_map(|round| Some(nanos(round)? / reference(round)?)));
        let figure = Figure::estimated(&path.name, world, "x reference", estimate)
            .detail("ns", median_of(rounds.iter().filter_map(nanos)));
        figures.push(match path.bar {
            Some(bar) => figure.bar(Bar::AtMost(bar)),
            None => figure,
        });
    }
    Ok(figures)
}

fn alone(round: &Round, run: Run, wrapper: Wrapper) -> Option<f64> {
    Some(round.get(&run)? - round.get(&Run::Wrapper(wrapper))?)
}
