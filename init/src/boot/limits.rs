//! Settings of the guest and of PID 1 that containers inherit or depend on: host name, resource limits, address
//! randomization, and PID 1's protection from the OOM killer.

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::error::{BootError, NameStep};

/// Limit of open files: the kernel's own maximum (`fs.nr_open`). Containers whose spec sets no limit inherit it, as
/// they do under containerd.
const OPEN_FILES: u64 = 1024 * 1024;

/// Linux's execution domain without flags (linux/personality.h; libc lacks it for musl).
const PER_LINUX: libc::c_ulong = 0;

pub(super) fn set_hostname(name: &str) -> Result<(), BootError> {
    nix::unistd::sethostname(name).step(|| format!("set the host name {name}"))
}

/// Raises the limits that containers inherit by default to those that a container daemon usually has.
pub(super) fn raise() -> Result<(), BootError> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).step(|| "set the limit of open files".into())?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).step(|| "set the limit of processes".into())
}

/// Enables address randomization for all programs but PID 1 (kernel.randomize_va_space, proc_sys_kernel(5)). On an
/// emulated CPU the kernel starts with `norandmaps`, so that PID 1 and its workers, which run the same binary, share
/// translated code.
pub(super) fn randomize_containers() -> Result<(), BootError> {
    std::fs::write("/proc/sys/kernel/randomize_va_space", "2").step(|| "set kernel.randomize_va_space to 2".into())
}

/// Loads all workers at the same addresses (personality(2)), so that an emulated CPU can reuse their translated code:
/// QEMU 7.2 translates code once for each address it runs at, which took more than half of a create. Each worker
/// reverts this with [`randomize_addresses`] for the programs that it starts.
pub(super) fn keep_addresses() -> Result<(), BootError> {
    personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong).step(|| "set the personality".into())
}

/// Reverts [`keep_addresses`] for programs that this process executes.
pub(crate) fn randomize_addresses() -> io::Result<()> {
    personality(PER_LINUX)
}

fn personality(persona: libc::c_ulong) -> io::Result<()> {
    // SAFETY: personality(2) takes an integer and touches no memory.
    if unsafe { libc::personality(persona) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Exempts PID 1 from the OOM killer: its death would be a kernel panic. Workers reset the value before they start
/// programs.
pub(super) fn protect_from_oom() -> Result<(), BootError> {
    std::fs::write("/proc/self/oom_score_adj", "-1000").step(|| "set oom_score_adj to -1000".into())
}
