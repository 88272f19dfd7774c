//! What PID 1 sets for itself and the guest: name, limits, and its place before the OOM killer.

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::{Error, Step};

/// Open files: the kernel's own ceiling (`fs.nr_open`). A container without the limit in its spec inherits it, as under containerd.
const OPEN_FILES: u64 = 1024 * 1024;

/// Linux's own execution domain without any flag (linux/personality.h; libc lacks it for musl).
const PER_LINUX: libc::c_ulong = 0;

/// Gives the guest its host name.
pub fn set_hostname(name: &str) -> Result<(), Error> {
    nix::unistd::sethostname(name).step(|| format!("set the host name {name}"))
}

/// Raises the limits that containers inherit when their spec is silent, to what a container daemon usually has.
pub fn raise_limits() -> Result<(), Error> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).step(|| "set the limit of open files".into())?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).step(|| "set the limit of processes".into())
}

/// Everything but PID 1 is loaded at addresses that nobody knows (kernel.randomize_va_space, proc_sys_kernel(5)), also where PID 1 itself was
/// not: on an emulated processor the kernel is started with `norandmaps`, so that PID 1 and its workers, one program, share what was
/// translated of it.
pub fn randomize_containers() -> Result<(), Error> {
    std::fs::write("/proc/sys/kernel/randomize_va_space", "2").step(|| "set kernel.randomize_va_space to 2".into())
}

/// Has the workers loaded at the same addresses every time (personality(2)). An emulated processor then knows their code from the last one: QEMU
/// 7.2 translates code anew for each address that it runs at, which took more than half of a create. Each worker takes it back for what it
/// starts: [`randomize_addresses`].
pub fn keep_addresses() -> Result<(), Error> {
    personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong).step(|| "set the personality".into())
}

/// Ends what [`keep_addresses`] began, for programs that this process will execute.
pub fn randomize_addresses() -> io::Result<()> {
    personality(PER_LINUX)
}

fn personality(persona: libc::c_ulong) -> io::Result<()> {
    // SAFETY: personality(2) takes an integer and touches no memory.
    if unsafe { libc::personality(persona) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The OOM killer must not take PID 1, which would be a kernel panic. Workers set theirs back before they start anything.
pub fn protect_from_oom() -> Result<(), Error> {
    std::fs::write("/proc/self/oom_score_adj", "-1000").step(|| "set oom_score_adj to -1000".into())
}
