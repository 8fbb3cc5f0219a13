//! The initramfs of a kernel: Debian's tools and libraries, the kernel's modules, our programs, and the init script.
//! The machine has nothing else: there is no disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::apt::only;
use super::machine::Machine;
use crate::process::output;

/// Suite that [`TOOLS`] are taken from. It is the same for every kernel, so that only the kernel differs.
pub(super) const TOOLS_SUITE: &str = "bookworm";
/// Packages that contain [`TOOLS`].
pub(super) const TOOLS_PACKAGES: [&str; 5] =
    ["busybox-static", "bpftool", "iproute2", "nftables", "wireguard-tools"];
/// Tools that the rows run, by their paths in the packages.
const TOOLS: [&str; 6] =
    ["bin/busybox", "bin/ip", "sbin/tc", "usr/bin/wg", "usr/sbin/bpftool", "usr/sbin/nft"];

/// Modules that the rows need, each after the modules that it needs itself. A kernel has some of them built in, and
/// lacks others.
const MODULES: [&str; 31] = [
    // Algorithms that SCTP asks for by name.
    "crc32c_generic",
    "md5",
    "sha1_generic",
    "sha256_generic",
    "hmac",
    // Devices.
    "veth",
    "dummy",
    "bridge",
    "8021q",
    "bonding",
    "ipip",
    "wireguard",
    "vxlan",
    "tun",
    // Sockets.
    "sctp",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "sctp_diag",
    // Programs on devices.
    "sch_ingress",
    "cls_bpf",
    // nftables.
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    "nft_reject_inet",
];

/// A kernel, as unpacked from its packages.
pub(super) struct Image {
    /// File that QEMU starts.
    pub(super) kernel: PathBuf,
    modules: PathBuf,
}

impl Image {
    /// Finds the kernel and the modules below `root`, wherever that kernel's packages put them.
    ///
    /// # Errors
    /// When one of them is missing.
    pub(super) fn find(root: &Path) -> Result<Self> {
        let lib = if root.join("usr/lib/modules").exists() { "usr/lib/modules" } else { "lib/modules" };
        let modules = only(&root.join(lib), |_| true)?;
        let beside = modules.join("vmlinuz");
        let kernel = if beside.exists() {
            beside
        } else {
            only(&root.join("boot"), |name| name.starts_with("vmlinuz-"))?
        };
        Ok(Self { kernel, modules })
    }

    /// Returns the release, as `uname -r` prints it.
    fn release(&self) -> Result<&str> {
        self.modules.file_name().and_then(|name| name.to_str()).context("the modules' directory has no name")
    }

    /// Copies the modules into `tree` and lists them in `/modules`, in order; returns the names of modules that this
    /// kernel has neither as a module nor built in.
    fn install_modules(&self, tree: &Path) -> Result<Vec<&'static str>> {
        let release = self.release()?;
        // depmod looks below lib/modules of a directory: this directory has a link to the kernel's modules.
        let base = tree.with_extension("depmod");
        fresh(&base.join("lib/modules"))?;
        symlink(&self.modules, base.join("lib/modules").join(release)).context("cannot make a link")?;
        output(Command::new("depmod").arg("-b").arg(&base).arg(release))?;
        fs::remove_dir_all(&base).context("cannot remove depmod's directory")?;
        let (order, missing) =
            load_order(&MODULES, &self.read("modules.dep")?, &self.read("modules.builtin")?);
        let dir = tree.join("lib/modules");
        fs::create_dir_all(&dir).context("cannot create the modules' directory")?;
        let mut list = String::new();
        for module in &order {
            let name = Path::new(module)
                .file_name()
                .and_then(|name| name.to_str())
                .context("a module has no name")?;
            let from = self.modules.join(module);
            let plain = match name.rsplit_once('.') {
                Some((plain, "xz")) => unpack("xz", &from, &dir.join(plain)).map(|()| plain)?,
                Some((plain, "zst")) => unpack("zstd", &from, &dir.join(plain)).map(|()| plain)?,
                _ => copy(&from, &dir.join(name)).map(|()| name)?,
            };
            list.push_str(&format!("/lib/modules/{plain}\n"));
        }
        write(&tree.join("modules"), &list, 0o644)?;
        Ok(missing)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// Directory of our programs, and whether they need libraries.
pub(super) struct Programs {
    /// Directory of `proxy-agent`, `lab-pod` and `kernel-rows`.
    pub(super) dir: PathBuf,
    /// Whether they are built for this machine and not static: their libraries are then copied too.
    pub(super) dynamic: bool,
}

/// Our programs that run in the kernel.
const PROGRAMS: [&str; 3] = ["proxy-agent", "lab-pod", "kernel-rows"];

/// Writes the initramfs of `image` to `archive` and returns the modules that this kernel lacks. The archive is
/// uncompressed: an emulated machine takes longer to unpack it than to copy it.
///
/// # Errors
/// When something that belongs in the archive is missing, or the archive cannot be written.
pub(super) fn write_archive(
    image: &Image,
    machine: Machine,
    tools: &Path,
    programs: &Programs,
    archive: &Path,
) -> Result<Vec<&'static str>> {
    let tree = archive.with_extension("tree");
    fresh(&tree)?;
    for dir in "usr/bin usr/sbin usr/lib usr/lib64 busybox dev etc proc root run sys tmp var".split(' ') {
        fs::create_dir_all(tree.join(dir)).with_context(|| format!("cannot create /{dir}"))?;
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), tree.join(dir)).context("cannot make a link")?;
    }
    symlink("/run", tree.join("var/run")).context("cannot make a link")?;
    for tool in TOOLS {
        copy(&tools.join(tool), &tree.join(tool))?;
    }
    let triple = format!("{}-linux-gnu", machine.name());
    for dir in ["lib", "usr/lib", "lib64"] {
        install_libraries(&tools.join(dir), &tree.join(dir))?;
        install_libraries(&tools.join(dir).join(&triple), &tree.join(dir).join(&triple))?;
    }
    for program in PROGRAMS {
        let from = programs.dir.join(program);
        ensure!(from.exists(), "{} was not built", from.display());
        let to = tree.join("bin").join(program);
        if !programs.dynamic {
            copy(&from, &to)?;
            continue;
        }
        // Three quarters of a development binary are debug information.
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&to).arg(&from))?;
        // This machine's C library replaces that of the tools: the programs need one as new as theirs.
        for library in libraries(&output(Command::new("ldd").arg(&from))?) {
            let to = tree.join(library.trim_start_matches('/'));
            if let Some(dir) = to.parent() {
                fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            }
            if to.is_symlink() {
                fs::remove_file(&to).with_context(|| format!("cannot replace {}", to.display()))?;
            }
            copy(Path::new(&library), &to)?;
        }
    }
    write(&tree.join("init"), include_str!("init.sh"), 0o755)?;
    let missing = image.install_modules(&tree)?;
    // Run by a shell: cpio reads the list of files from a pipe.
    let mut cpio = Command::new("sh");
    cpio.args([
        "-ec",
        "find . -print0 | LC_ALL=C sort -z | cpio --null --create --format=newc --owner=0:0 --quiet > \"$1\"",
        "cpio",
    ]);
    output(cpio.arg(archive).current_dir(&tree))?;
    fs::remove_dir_all(&tree).context("cannot remove the tree of the initramfs")?;
    Ok(missing)
}

/// Copies the shared libraries of one directory, if it exists, with the links that point to them.
fn install_libraries(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in entries.flatten() {
        let (from, name) = (entry.path(), entry.file_name());
        if !name.to_string_lossy().contains(".so") {
            continue;
        }
        match fs::read_link(&from) {
            Ok(target) => symlink(target, to.join(&name)).context("cannot make a link")?,
            Err(_) if from.is_file() => copy(&from, &to.join(&name))?,
            Err(_) => {}
        }
    }
    Ok(())
}

/// Returns the files of the modules `wanted` and of all that they need, each after the modules that it needs, and the
/// names of modules that are neither present nor built in.
fn load_order<'a>(wanted: &[&'a str], dep: &str, builtin: &str) -> (Vec<String>, Vec<&'a str>) {
    let needs: BTreeMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (module(path), (path, needs)))
        .collect();
    let builtin: BTreeSet<String> = builtin.lines().map(module).collect();
    let (mut order, mut missing) = (Vec::new(), Vec::new());
    for name in wanted {
        match needs.get(*name) {
            // depmod lists all modules that a module needs, the deepest last.
            Some((path, needs)) => {
                for path in needs.split_whitespace().rev().chain([*path]) {
                    if !order.iter().any(|had| had == path) {
                        order.push(path.to_owned());
                    }
                }
            }
            None if builtin.contains(*name) => {}
            None => missing.push(*name),
        }
    }
    (order, missing)
}

fn module(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// Returns the files that `ldd` names.
fn libraries(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned))
        .collect()
}

fn unpack(tool: &str, from: &Path, to: &Path) -> Result<()> {
    let file = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let status = Command::new(tool).arg("-dc").arg(from).stdout(file).status();
    ensure!(
        status.with_context(|| format!("cannot start {tool}"))?.success(),
        "{tool} cannot unpack {}",
        from.display()
    );
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Err(error) = fs::copy(from, to) {
        bail!("cannot copy {} to {}: {error}", from.display(), to.display());
    }
    Ok(())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// Makes `dir` an empty directory.
fn fresh(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dep = "kernel/net/sctp/sctp.ko: kernel/lib/libcrc32c.ko\n\
            kernel/lib/libcrc32c.ko:\n\
            kernel/drivers/net/wireguard/wireguard.ko.xz: kernel/a/libchacha-x.ko.xz kernel/a/chacha.ko.xz\n\
            kernel/a/libchacha-x.ko.xz: kernel/a/chacha.ko.xz\nkernel/a/chacha.ko.xz:\n\
            kernel/net/nf-tables.ko: kernel/lib/libcrc32c.ko\n";
        let wanted = ["sctp", "wireguard", "veth", "nft_counter", "nf_tables"];
        let (order, missing) = load_order(&wanted, dep, "kernel/drivers/net/veth.ko\n");
        let expected = [
            "kernel/lib/libcrc32c.ko",
            "kernel/net/sctp/sctp.ko",
            "kernel/a/chacha.ko.xz",
            "kernel/a/libchacha-x.ko.xz",
            "kernel/drivers/net/wireguard/wireguard.ko.xz",
            "kernel/net/nf-tables.ko",
        ];
        assert_eq!(order, expected);
        assert_eq!(missing, ["nft_counter"]);
    }

    #[test]
    fn libraries_are_the_paths_that_ldd_names() {
        let ldd = "\tlinux-vdso.so.1 (0x7ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f1)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f2)\n";
        assert_eq!(libraries(ldd), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
