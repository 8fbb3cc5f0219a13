//! The node for which the inputs are programmed, without a kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::LazyLock;

use crate::agent::knowledge::Knowledge;
use crate::commands::explain::explanation::explain;
use crate::commands::explain::print::words;
use crate::commands::explain::question::Question;
use crate::commands::inspect::{backend_views, print_backends, print_services, service_views};
use crate::config::args::{Cli, Command, RunArgs};
use crate::config::{Config, Raw};
use crate::host::{Host, HostAddresses};
use crate::reconcile::cluster::{Change, ObjectKey};
use crate::reconcile::drift::differences;
use crate::reconcile::model::Model;
use crate::reconcile::plan::{Wanted, plan};
use crate::reconcile::sim::Simulator;
use crate::reconcile::store::{Capacity, MapStore as _, Op, filter_words};
use crate::sources::Problem;
use proxy_common::abi::IfIndex;

use super::printed::{lines, printed};

/// The node's name.
pub(super) const NAME: &str = "n1";
/// Part of the name of a valid object beside those of the input.
pub(super) const WITNESS: &str = "witness";

const ADDRESSES: [&str; 4] = ["192.0.2.10", "2001:db8:1::10", "127.0.0.1", "::1"];
/// Largest number of frontends that are asked about.
const ASKED: usize = 4;

/// Capacity that suffices for most inputs.
const CAPACITY: Capacity =
    Capacity { frontends: 4096, services: 1024, slots: 4096, backends: 2048, source_ranges: 256 };

static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let args = run_args(&[
        "--manifests=/",
        "--cluster-cidr=10.64.0.0/16,fd00:64::/48",
        "--socket-opt-out=annotation",
    ]);
    let raw = Raw::load(&args).expect("there is no file");
    Config::resolve(&args, raw, &host()).expect("the flags are good")
});

/// Returns the arguments of `proxy-agent run` with these flags.
pub(super) fn run_args(flags: &[&str]) -> RunArgs {
    let line = ["proxy-agent", "run"].iter().chain(flags).map(OsString::from);
    match Cli::from_command_line(line).map(|cli| cli.command) {
        Ok(Command::Run(args)) => *args,
        other => unreachable!("{other:?}"),
    }
}

/// Returns a host for `--write-config-to`.
pub(super) fn host() -> Host {
    Host { name: NAME.to_owned(), ipv6: true, cgroup: PathBuf::from("/sys/fs/cgroup") }
}

/// The agent's knowledge and maps.
pub(super) struct Node {
    known: Knowledge,
    model: Model,
    maps: Simulator,
    first: bool,
    /// Whether something exceeded the capacity.
    full: bool,
}

impl Node {
    pub(super) fn new() -> Self {
        let mut known = Knowledge::new(&CONFIG);
        let addresses =
            ADDRESSES.iter().map(|text| (text.parse::<IpAddr>().expect("an address").into(), IfIndex(2)));
        known.take_addresses(&addresses.collect::<HostAddresses>());
        Self { known, model: Model::new(CAPACITY), maps: Simulator::default(), first: true, full: false }
    }

    pub(super) fn config() -> &'static Config {
        &CONFIG
    }

    /// Applies changes, and programs what follows from them.
    pub(super) fn take(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.known.cluster.apply(change);
        }
        self.known.take_node(&CONFIG);
        let node = self.known.plan_node(&CONFIG.nodeport_addresses, &mut self.model);
        self.carry_out(&node.ops);
        let mut dirty = self.known.cluster.take_dirty();
        dirty.extend(node.concerned);
        let wanted = dirty.into_iter().map(|key| (key.clone(), self.known.wanted(&key))).collect();
        let plan = plan(&mut self.model, &wanted, self.first);
        self.carry_out(&plan.ops);
        // The maps have no readers meanwhile.
        self.model.release(plan.freed);
        (self.first, self.full) = (false, self.full | !plan.refused.is_empty());
    }

    fn carry_out(&mut self, ops: &[Op]) {
        for op in ops {
            self.maps.apply(op).expect("the plan fits into the maps");
        }
    }

    /// Checks the maps as `proxy-agent verify` does, and also as if the agent had just started.
    fn verify(&self) {
        let contents = self.maps.contents();
        let filter = filter_words(&contents);
        assert_eq!(differences(&self.model, &contents, &filter), []);
        if self.full {
            return;
        }
        let mut anew = Model::restore(CAPACITY, &contents);
        let services = self.known.cluster.services().map(|service| service.key.clone());
        let named = anew.ports.keys().map(|port| port.service.clone());
        let all: BTreeSet<ObjectKey> = services.chain(named).collect();
        let wanted: BTreeMap<ObjectKey, Option<Wanted>> =
            all.into_iter().map(|key| (key.clone(), self.known.wanted(&key))).collect();
        self.known.plan_node(&CONFIG.nodeport_addresses, &mut anew);
        plan(&mut anew, &wanted, true);
        assert_eq!(differences(&anew, &contents, &filter), []);
    }

    /// Runs `verify`, `services`, `backends` and `explain`.
    pub(super) fn ask(&self) {
        self.verify();
        let services = service_views(&self.model);
        printed(|output, out| print_services(&services, output, out));
        let backends = backend_views(&self.model);
        printed(|output, out| print_backends(&backends, output, out));
        for (key, _) in self.maps.contents().frontends.iter().take(ASKED) {
            let question =
                Question { proto: key.proto, addr: key.addr, port: key.port, from: None, cgroup: None };
            let mut out = Vec::new();
            words(&explain(&self.maps, &self.model, &question), &mut out).expect("memory takes everything");
            lines(&String::from_utf8(out).expect("it is text"));
        }
    }

    pub(super) fn has_witness(&self) -> bool {
        self.known.cluster.service(&ObjectKey::new(WITNESS, WITNESS)).is_some()
    }

    /// Returns the number of Services.
    pub(super) fn services(&self) -> usize {
        self.known.cluster.services().count()
    }

    /// Removes all Services and slices, and checks that nothing of them remains.
    pub(super) fn end(mut self) {
        let services: Vec<ObjectKey> =
            self.known.cluster.services().map(|service| service.key.clone()).collect();
        self.take(services.into_iter().map(Change::ServiceGone).collect());
        let contents = self.maps.contents();
        assert_eq!((contents.frontends.len(), contents.names.len()), (0, 0));
        assert!(contents.backends.iter().all(|backend| backend.state.flags == 0));
    }
}

/// Returns whether the input may contain the witness's name.
pub(super) fn speaks_of_witness(data: &[u8]) -> bool {
    // Text with escapes or in UTF-16 may contain any name.
    data.iter().any(|byte| [b'\\', 0].contains(byte))
        || data.windows(WITNESS.len()).any(|part| part == WITNESS.as_bytes())
}

/// Checks that each problem names an object and a reason.
pub(super) fn check_problems(problems: &[Problem]) {
    for problem in problems {
        assert!(!problem.object.is_empty() && !problem.reason.is_empty(), "{problem:?}");
    }
}
