//! Debian packages of one suite for one machine, unpacked below the target directory and never installed.
//!
//! Each suite and machine has an apt directory of its own: lists, cache, an empty status file, one source. Nothing
//! below /etc or /var changes. One option of apt selects a machine of another architecture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::machine::Machine;
use crate::process::{field, output, run as run_command, say};

/// Keys that Debian signs its archives with, of package `debian-archive-keyring`.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Mirror for a machine whose own sources name none.
const MIRROR: &str = "http://deb.debian.org/debian";
/// Archive to which suites move when their support has ended.
const ARCHIVE: &str = "http://archive.debian.org/debian";

/// One suite for one machine.
pub(super) struct Apt {
    suite: &'static str,
    machine: Machine,
    dir: PathBuf,
}

impl Apt {
    /// Updates the lists of `suite`. When that fails, the lists of an earlier run are used.
    ///
    /// # Errors
    /// When the directory cannot be written, or there are no lists at all.
    pub(super) fn update(suite: &'static str, machine: Machine) -> Result<Self> {
        let dir = super::machine::dir().join(machine.name()).join(suite);
        let apt = Self { suite, machine, dir };
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.dir.join(part))
                .with_context(|| format!("cannot create {}", apt.dir.display()))?;
        }
        apt.write("status", "")?;
        apt.write("apt.conf", &apt.config())?;
        let mirror = mirror();
        let mut failure = None;
        for mirror in [mirror.as_str(), ARCHIVE] {
            apt.write("sources.list", &format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
            match output(apt.command("apt-get").args(["update", "--quiet", "--error-on=any"])) {
                Ok(_) => return Ok(apt),
                // The first mirror's error is kept: it says more than that an archive has nothing.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        apt.write("sources.list", &format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
        let failure = failure.context("no mirror was tried")?;
        let lists = fs::read_dir(apt.dir.join("lists")).context("cannot read apt's lists")?;
        let kept = lists.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
        if kept {
            say(&format!("{suite} ({machine}): going on with the package lists from before: {failure:#}"));
            return Ok(apt);
        }
        Err(failure.context(format!("cannot read Debian's package lists of {suite} ({machine})")))
    }

    /// Unpacks the kernel that the metapackage `meta` names; returns its directory and its version.
    ///
    /// # Errors
    /// When there is no such kernel, or it cannot be fetched or unpacked.
    pub(super) fn kernel(&self, meta: &str) -> Result<(PathBuf, String)> {
        let mut names = vec![meta.to_owned()];
        let mut version = String::new();
        let mut next = 0;
        while let Some(name) = names.get(next) {
            let shown = output(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
            let (own, parts) = exact_dependencies(&shown)
                .with_context(|| format!("apt knows no version of {name} in {}", self.suite))?;
            if next == 0 {
                version = own;
            }
            let new: Vec<_> = parts.into_iter().filter(|part| !names.contains(part)).collect();
            names.extend(new);
            next += 1;
        }
        Ok((self.unpack("kernel", &names)?, version))
    }

    /// Unpacks `programs` with all that they depend on; returns their directory.
    ///
    /// # Errors
    /// When a package is missing, or cannot be fetched or unpacked.
    pub(super) fn tools(&self, programs: &[&str]) -> Result<PathBuf> {
        let mut apt = self.command("apt-get");
        apt.args(["install", "--print-uris", "--quiet=2", "--yes", "--no-install-recommends"]);
        let files = printed_files(&output(apt.args(programs))?);
        let names: Vec<_> =
            files.iter().filter_map(|file| file.split('_').next()).map(str::to_owned).collect();
        self.unpack("tools", &names)
    }

    /// Fetches and unpacks packages into the directory `what`, unless exactly these versions are there.
    fn unpack(&self, what: &str, names: &[String]) -> Result<PathBuf> {
        let files =
            printed_files(&output(self.command("apt-get").args(["download", "--print-uris"]).args(names))?);
        ensure!(files.len() == names.len(), "apt knows {files:?} of {names:?} only");
        let (root, stamp) = (self.dir.join(what), self.dir.join(format!("{what}.packages")));
        let wanted = files.join("\n");
        if fs::read_to_string(&stamp).is_ok_and(|kept| kept == wanted) {
            return Ok(root);
        }
        say(&format!("fetching {} packages of {} ({}): {what}", files.len(), self.suite, self.machine));
        let debs = self.dir.join("debs");
        for dir in [&root, &debs] {
            if dir.exists() {
                fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
            }
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        run_command(self.command("apt-get").args(["download", "--quiet=2"]).args(names).current_dir(&debs))?;
        for deb in fs::read_dir(&debs).with_context(|| format!("cannot read {}", debs.display()))? {
            let deb = deb.context("cannot read a directory")?.path();
            output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
        }
        fs::remove_dir_all(&debs).with_context(|| format!("cannot remove {}", debs.display()))?;
        // Written last: an interrupted fetch is then repeated.
        self.write(&format!("{what}.packages"), &wanted)?;
        Ok(root)
    }

    /// Returns apt's settings: the machine's own (a proxy, say), overridden by those that keep apt within this
    /// directory.
    fn config(&self) -> String {
        let arch = self.machine.debian();
        let dir = self.dir.display();
        format!(
            r#"Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{dir}";
APT::Architecture "{arch}";
#clear APT::Architectures;
APT::Architectures {{ "{arch}"; }};
// The target directory may be closed to apt's own user.
APT::Sandbox::User "root";
// Nothing of the machine's is told about these lists.
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
// Suites out of support are not signed anew, and the clock of a machine that has just started may be wrong.
Acquire::Check-Valid-Until "false";
Acquire::Check-Date "false";
"#
        )
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join("apt.conf"));
        command
    }
}

/// Returns the mirror that the machine's own apt uses, else Debian's.
fn mirror() -> String {
    let targets = Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]).output();
    let targets = targets.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    debian_mirror(&targets).unwrap_or(MIRROR).to_owned()
}

/// Finds the first repository that looks like a mirror of Debian's main archive.
fn debian_mirror(repositories: &str) -> Option<&str> {
    let mut repositories = repositories.lines().map(|line| line.trim().trim_end_matches('/'));
    repositories.find(|uri| uri.starts_with("http") && uri.ends_with("/debian"))
}

/// Returns the version of a package, and the packages that it needs in exactly that version.
///
/// A metapackage names its kernel by such a dependency, and a newer kernel its image and its modules. The other
/// dependencies of a kernel matter only for installing it.
fn exact_dependencies(shown: &str) -> Option<(String, Vec<String>)> {
    let version = field(shown, "Version: ")?;
    let exact = format!(" (= {version})");
    let parts = field(shown, "Depends: ").unwrap_or_default().split(", ");
    Some((
        version.to_owned(),
        parts.filter_map(|part| part.strip_suffix(&exact)).map(str::to_owned).collect(),
    ))
}

/// Returns the file names in apt's output for `--print-uris`: quoted address, file name, size, sum.
fn printed_files(printed: &str) -> Vec<String> {
    let lines = printed.lines().filter(|line| line.starts_with('\''));
    lines.filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect()
}

/// Returns the only entry of `dir` that `accept` accepts.
///
/// # Errors
/// When there is no such entry, or more than one.
pub(super) fn only(dir: &Path, accept: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut found = entries.flatten().filter(|entry| accept(&entry.file_name().to_string_lossy()));
    let first = found.next().with_context(|| format!("{} lacks what was expected", dir.display()))?;
    ensure!(found.next().is_none(), "{} has more than was expected", dir.display());
    Ok(first.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_kernel_are_what_it_needs_in_its_own_version() {
        let shown = "Package: linux-image-7.2.13+deb14-cloud-amd64\nVersion: 7.2.13-1\n\
            Pre-Depends: linux-base (>= 4.17~)\n\
            Depends: dracut | initramfs-tools (>= 0.120+deb8u2), linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), \
            linux-modules-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), kmod\n";
        let (version, parts) = exact_dependencies(shown).unwrap();
        assert_eq!(version, "7.2.13-1");
        let expected = ["linux-binary-7.2.13+deb14-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"];
        assert_eq!(parts, expected);
        assert_eq!(exact_dependencies("Version: 1\n"), Some(("1".into(), Vec::new())));
        assert_eq!(exact_dependencies("N: Unable to locate package\n"), None);
    }

    #[test]
    fn the_mirror_is_that_of_the_machine() {
        let repositories = "https://deb.nodesource.com/node_20.x/\nhttp://deb.debian.org/debian-security/\n\
            http://mirror.example/debian/\nhttp://other.example/debian/\n";
        assert_eq!(debian_mirror(repositories), Some("http://mirror.example/debian"));
        assert_eq!(debian_mirror("http://archive.ubuntu.com/ubuntu/\n"), None);
        assert_eq!(debian_mirror("file:/srv/debian/\n"), None);
    }

    #[test]
    fn files_are_read_from_printed_addresses() {
        let printed =
            "N: a notice\n'http://m/debian/pool/i/ip_6.1_amd64.deb' ip_6.1_amd64.deb 104 SHA256:ab\n";
        assert_eq!(printed_files(printed), ["ip_6.1_amd64.deb"]);
    }
}
