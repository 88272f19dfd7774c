//! What PID 1 sets for itself and the guest: name, limits, and its place before the OOM killer.

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::{Error, Step};

/// Open files: the kernel's own ceiling (`fs.nr_open`). A container without the limit in its spec inherits it, as under containerd.
const OPEN_FILES: u64 = 1024 * 1024;

/// Gives the guest its host name.
pub fn set_hostname(name: &str) -> Result<(), Error> {
    nix::unistd::sethostname(name).step(|| format!("set the host name {name}"))
}

/// Raises the limits that containers inherit when their spec is silent, to what a container daemon usually has.
pub fn raise_limits() -> Result<(), Error> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).step(|| "set the limit of open files".into())?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).step(|| "set the limit of processes".into())
}

/// The OOM killer must not take PID 1, which would be a kernel panic. Workers set theirs back before they start anything.
pub fn protect_from_oom() -> Result<(), Error> {
    std::fs::write("/proc/self/oom_score_adj", "-1000").step(|| "set oom_score_adj to -1000".into())
}
