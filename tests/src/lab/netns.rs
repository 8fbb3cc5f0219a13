//! Network namespaces without a name: held by a descriptor, gone with the process.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};

use super::exec::Exec;
use super::sys;

/// Kernel parameters of every namespace: IPv6 on, its addresses usable at once, nothing configured by router
/// advertisements, ping sockets for everybody. ICMP errors have no rate limit, because tests count refusals.
const COMMON_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv4/icmp_ratemask", "0"),
    ("net/ipv6/icmp/ratelimit", "0"),
    // A type that is not an error, because an empty mask cannot be written.
    ("net/ipv6/icmp/ratemask", "255"),
];

/// Further kernel parameters of namespaces that route for others.
const ROUTER_SYSCTLS: &[(&str, &str)] =
    &[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")];

/// Purpose of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An endpoint of traffic: a pod, a client.
    Leaf,
    /// A node, or the network between nodes: forwards IPv4 and IPv6.
    Router,
}

/// A network namespace. Clones refer to the same one, which ends when the last clone and the last process in it are
/// gone.
#[derive(Clone, Debug)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// Makes a namespace and sets its kernel parameters. Every link in it is down, `lo` too.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or if a kernel parameter cannot be set.
    pub fn new(role: Role) -> Result<Self> {
        joined(thread::scope(|scope| scope.spawn(|| Self::create(role)).join()))
    }

    fn create(role: Role) -> Result<Self> {
        sys::unshare_net().context("unshare(CLONE_NEWNET) failed: the lab needs root, see `sudo -E`")?;
        let own = File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")?;
        let router = if role == Role::Router { ROUTER_SYSCTLS } else { &[] };
        for (key, value) in COMMON_SYSCTLS.iter().chain(router) {
            write_sysctl(key, value)?;
        }
        Ok(Self(Arc::new(own.into())))
    }

    /// Runs `work` on a thread inside the namespace and returns its result. Sockets that it opens stay in the
    /// namespace.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || {
            sys::join_net(self.0.as_fd()).context("setns failed: the lab needs root")?;
            Ok(work())
        };
        joined(thread::scope(|scope| scope.spawn(inside).join()))
    }

    /// Sets a kernel parameter, named by its path below `/proc/sys`.
    ///
    /// # Errors
    /// If the parameter does not exist, or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.enter(|| write_sysctl(key, value))?
    }

    /// Runs `ip -batch` on `lines`, one `ip` command each without the word `ip`. Lines that begin with `-6 ` run last:
    /// `ip` takes the family for a batch, not for a line.
    ///
    /// # Errors
    /// With the output of `ip` and the batch, if a line fails; the lines before it stay in effect.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let (mut any, mut v6) = (String::new(), String::new());
        for line in lines.lines() {
            let (batch, line) = line.strip_prefix("-6 ").map_or((&mut any, line), |line| (&mut v6, line));
            batch.push_str(line);
            batch.push('\n');
        }
        self.ip_batch(&["-batch", "-"], &any)?;
        self.ip_batch(&["-6", "-batch", "-"], &v6)
    }

    /// Runs `bridge -batch` on `lines`.
    ///
    /// # Errors
    /// As [`Netns::ip`].
    pub fn bridge(&self, lines: &str) -> Result<()> {
        self.batch("bridge", "iproute2", &["-batch", "-"], lines)
    }

    /// Adds the rules in `ruleset`, in the syntax of `nft`.
    ///
    /// # Errors
    /// If `nft` is missing or rejects a rule; no rule is then added.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        self.batch("nft", "nftables", &["-f", "-"], ruleset)
    }

    fn ip_batch(&self, args: &[&str], lines: &str) -> Result<()> {
        self.batch("ip", "iproute2", args, lines)
    }

    fn batch(&self, program: &str, package: &str, args: &[&str], lines: &str) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut command = Exec::in_netns(self, program);
        command.args(args);
        let output = command
            .output_with_input(lines)
            .with_context(|| format!("the lab needs `{program}`, the package {package}"))?;
        anyhow::ensure!(
            output.status.success(),
            "`{program} {}` failed: {}of the batch:\n{lines}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Returns a path by which other processes of the machine can name the namespace while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Returns the descriptor.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }
}

/// Returns the result of a joined thread; resumes its panic in the caller.
fn joined<T>(result: thread::Result<T>) -> T {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn write_sysctl(key: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{key}"), value)
        .with_context(|| format!("cannot set /proc/sys/{key} to {value}"))
}
