//! System calls that `seccompProfile: RuntimeDefault` withholds from a container.
//!
//! The profiles of container runtimes list allowed calls. This module lists the others: those that containerd 1.7 (the
//! package `contrib/seccomp`) does not allow, and those that CRI-O 1.26 withholds beyond them. The runtimes' versions
//! differ only in calls that no program here makes.

use std::collections::BTreeMap;
use std::env;

use anyhow::Result;
use libc::c_long;
use rustix::thread::CapabilitySet;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

#[cfg(target_arch = "x86_64")]
const SYS_KEXEC_FILE_LOAD: c_long = libc::SYS_kexec_file_load;
/// Number from asm-generic/unistd.h, which the `libc` crate lacks for musl.
#[cfg(not(target_arch = "x86_64"))]
const SYS_KEXEC_FILE_LOAD: c_long = 294;

/// Calls that are withheld whatever the capabilities are.
const NEVER: &[c_long] = &[
    libc::SYS_add_key,
    libc::SYS_get_mempolicy,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    SYS_KEXEC_FILE_LOAD,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mbind,
    // Withheld by CRI-O.
    libc::SYS_membarrier,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_nfsservctl,
    libc::SYS_pivot_root,
    libc::SYS_request_key,
    libc::SYS_set_mempolicy,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_userfaultfd,
];

/// Calls that are allowed with one of these capabilities.
const BY_CAPABILITY: &[(CapabilitySet, &[c_long])] = &[
    (CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN), &[libc::SYS_bpf]),
    (CapabilitySet::PERFMON.union(CapabilitySet::SYS_ADMIN), &[libc::SYS_perf_event_open]),
    (CapabilitySet::SYSLOG.union(CapabilitySet::SYS_ADMIN), &[libc::SYS_syslog]),
    (
        CapabilitySet::SYS_ADMIN,
        &[
            libc::SYS_fanotify_init,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_lookup_dcookie,
            libc::SYS_mount,
            libc::SYS_mount_setattr,
            libc::SYS_move_mount,
            libc::SYS_name_to_handle_at,
            libc::SYS_open_tree,
            libc::SYS_quotactl,
            libc::SYS_setdomainname,
            libc::SYS_sethostname,
            libc::SYS_setns,
            libc::SYS_umount2,
            libc::SYS_unshare,
        ],
    ),
    (
        CapabilitySet::SYS_PTRACE,
        &[
            libc::SYS_kcmp,
            libc::SYS_pidfd_getfd,
            libc::SYS_process_madvise,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
        ],
    ),
    (CapabilitySet::DAC_READ_SEARCH, &[libc::SYS_open_by_handle_at]),
    (CapabilitySet::SYS_BOOT, &[libc::SYS_reboot]),
    (CapabilitySet::SYS_CHROOT, &[libc::SYS_chroot]),
    (CapabilitySet::SYS_MODULE, &[libc::SYS_delete_module, libc::SYS_finit_module, libc::SYS_init_module]),
    (CapabilitySet::SYS_PACCT, &[libc::SYS_acct]),
    (CapabilitySet::SYS_TIME, &[libc::SYS_clock_settime, libc::SYS_settimeofday]),
    (CapabilitySet::SYS_TTY_CONFIG, &[libc::SYS_vhangup]),
];

/// Returns the filter for a container with these capabilities: a withheld call fails with EPERM.
///
/// # Errors
/// If the system calls of this machine's architecture are not known.
pub(super) fn runtime_default(capabilities: CapabilitySet) -> Result<BpfProgram> {
    let lacking = BY_CAPABILITY.iter().filter(|(enough, _)| !capabilities.intersects(*enough));
    let withheld = NEVER.iter().chain(lacking.flat_map(|(_, calls)| calls.iter()));
    let rules: BTreeMap<i64, Vec<_>> = withheld.map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}
