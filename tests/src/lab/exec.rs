//! Running programs inside a place of the lab, and ending them with the lab.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::container::Container;
use super::netns::Netns;
use super::sys::{self, Confinement};

/// A program to be run in a network namespace and a cgroup: `std::process::Command` with a place. Its environment has
/// only `PATH`: the lab user's settings of proxies, clusters or log levels must not affect it.
#[derive(Debug)]
pub struct Exec {
    command: Command,
    net: Netns,
    cgroup: Option<PathBuf>,
    container: Option<Container>,
}

impl Exec {
    /// Prepares `program` to run in `net` and `cgroup`.
    pub fn new(net: &Netns, cgroup: &Path, program: impl AsRef<OsStr>) -> Self {
        Self { cgroup: Some(cgroup.to_path_buf()), ..Self::in_netns(net, program) }
    }

    /// Prepares `program` to run in `net` and the cgroup of this process.
    pub(super) fn in_netns(net: &Netns, program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", path());
        Self { command, net: net.clone(), cgroup: None, container: None }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.command.env(key, value);
        self
    }

    /// Sets standard input; inherited by default.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.command.stdin(stdin);
        self
    }

    /// Sets standard output; inherited by default.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.command.stdout(stdout);
        self
    }

    /// Sets standard error; inherited by default.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.command.stderr(stderr);
        self
    }

    /// Runs the program in a container; its name is then a path in the container.
    pub fn contained(&mut self, container: Container) -> &mut Self {
        self.container = Some(container);
        self
    }

    /// Starts the program.
    ///
    /// # Errors
    /// With the name of the program, if it is missing or its place is gone.
    pub fn spawn(self) -> Result<Proc> {
        // The container's mount points must not vanish while it runs.
        let container = self.container.clone();
        let (program, child) = self.spawn_child()?;
        Ok(Proc { program, child, _container: container })
    }

    fn spawn_child(self) -> Result<(String, Child)> {
        let Self { mut command, net, cgroup, container } = self;
        let program = command.get_program().to_string_lossy().into_owned();
        let procs = match &cgroup {
            Some(dir) => {
                let path = dir.join("cgroup.procs");
                let file = OpenOptions::new().write(true).open(&path);
                Some(file.with_context(|| format!("cannot open {}: is the lab gone?", path.display()))?)
            }
            None => None,
        };
        sys::confine(&mut command, Confinement { net: net.fd(), procs, container });
        let child = spawn_from_lasting_thread(command);
        let child = child
            .with_context(|| format!("cannot run {program} in the lab: is it installed and in PATH?"))?;
        Ok((program, child))
    }

    /// Runs the program to its end, with no input, and returns its output.
    ///
    /// # Errors
    /// As [`Exec::spawn`]; a failing program is not an error here.
    pub fn output(self) -> Result<Output> {
        self.output_with_input("")
    }

    /// Runs the program to its end with `input` as standard input, which has to fit into a pipe (64 KiB), and returns
    /// its output.
    ///
    /// # Errors
    /// As [`Exec::spawn`]; a failing program is not an error here.
    pub fn output_with_input(mut self, input: &str) -> Result<Output> {
        self.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let _container = self.container.clone();
        let (program, mut child) = self.spawn_child()?;
        let sent = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().with_context(|| format!("cannot wait for {program}"))?;
        match sent {
            // A program may end without reading its input.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context(program),
            _ => Ok(output),
        }
    }

    /// Runs the program to its end and returns its standard output.
    ///
    /// # Errors
    /// With its standard error, if the program fails.
    pub fn text(self) -> Result<String> {
        let shown = format!("{:?}", self.command);
        let output = self.output()?;
        if !output.status.success() {
            bail!("{shown}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        String::from_utf8(output.stdout).with_context(|| format!("{shown}: its output is not UTF-8"))
    }
}

/// A running program; killed and reaped when dropped.
#[derive(Debug)]
pub struct Proc {
    program: String,
    child: Child,
    _container: Option<Container>,
}

impl Proc {
    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Takes the program's standard input, if it was piped.
    ///
    /// # Errors
    /// If it was not piped, or was taken before.
    pub fn take_stdin(&mut self) -> Result<ChildStdin> {
        self.child.stdin.take().with_context(|| format!("{}: no standard input", self.program))
    }

    /// Takes the program's standard output, if it was piped.
    ///
    /// # Errors
    /// If it was not piped, or was taken before.
    pub fn take_stdout(&mut self) -> Result<ChildStdout> {
        self.child.stdout.take().with_context(|| format!("{}: no standard output", self.program))
    }

    /// Returns the exit status; `None` while the program runs.
    ///
    /// # Errors
    /// If the process cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.program))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // A child that is not yet waited for keeps its id, so the signal cannot reach another process.
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal)
            .with_context(|| format!("cannot signal {} ({})", self.program, self.child.id()))
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// If the program is still running after `patience`; it is then killed.
    pub fn terminate(mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(patience)
    }

    /// Waits for the program to end.
    ///
    /// # Errors
    /// If the program is still running after `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} ({}) still runs after {patience:?}", self.program, self.id());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills the program with SIGKILL and waits for its end.
    pub fn kill9(mut self) {
        self.kill_and_reap();
    }

    fn kill_and_reap(&mut self) {
        // Both fail only if the process is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill_and_reap();
    }
}

/// Returns the search path of programs: `PATH`, and Debian's directories of `nft`, which an ordinary user's `PATH`
/// leaves out.
fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// A command to start, and the channel for its child.
type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Spawns from a thread that lives as long as the process: the death signal of a child is bound to the *thread* that
/// forked it, and a test may spawn from threads that end before the child does.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // The receiver waits below, unless its thread is unwinding.
                let _ = reply.send(command.spawn());
            }
        });
        jobs
    });
    let (reply, result) = mpsc::channel();
    let gone = "the lab's spawner thread has ended";
    spawner.send((command, reply)).map_err(|_disconnected| io::Error::other(gone))?;
    result.recv().map_err(|_disconnected| io::Error::other(gone))?
}
