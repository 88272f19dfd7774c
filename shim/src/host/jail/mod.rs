//! Separates a program from the host and from the programs of other VMs: namespaces and a user of its own, no way to
//! gain privileges, and a list of the system calls that it may use.
//!
//! A program needs files of the host to start: its libraries and modules. They are taken away when it runs, from outside:
//! see `root.rs`. Until then it reads nothing that comes from a container.
//!
//! | file        | contents                                                        |
//! |-------------|-----------------------------------------------------------------|
//! | `filter.rs` | a list of permitted system calls as a program for the kernel    |
//! | `loader.rs` | keeps a process's memory from other processes with its user     |
//! | `root.rs`   | gives a running process an empty root                           |
//! | `tmpfs.rs`  | a filesystem in memory that is mounted nowhere yet              |

use std::io;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, setresgid, setresuid};

pub(crate) mod filter;
pub(crate) mod loader;
pub(crate) mod root;
mod tmpfs;

use filter::Filter;
use loader::Loader;

/// Processes and threads that a jailed program's user may have. A QEMU has a thread per CPU, and up to 64 for asynchronous
/// I/O.
const TASKS_MAX: u64 = 1024;
/// Descriptors that it may have open. A QEMU has some per device.
const OPEN_MAX: u64 = 4096;

/// A user without capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What a program is separated by. It never gains privileges by executing another program.
#[derive(Debug)]
pub(crate) struct Jail {
    /// Namespaces of its own. In a PID namespace it is process 1: signals other than SIGKILL and SIGSTOP reach it only if
    /// it handles them.
    pub(crate) namespaces: CloneFlags,
    /// Root with all capabilities if none.
    pub(crate) user: Option<User>,
    /// Requires a mount namespace and a user.
    pub(crate) loader: Option<Loader>,
    /// The system calls that it may use; all if none. Must allow what the start of a program uses.
    pub(crate) filter: Option<Filter>,
    /// Root's capabilities that remain, as bits (linux/capability.h); all if none.
    pub(crate) capabilities: Option<u64>,
    /// All mounts of the host are read-only, and no device can be opened. Requires a mount namespace.
    pub(crate) read_only: bool,
}

impl Jail {
    /// Whether the program has a PID namespace of its own: only the child of a process can be in a new one.
    pub(super) fn has_own_pids(&self) -> bool {
        self.namespaces.contains(CloneFlags::CLONE_NEWPID)
    }

    /// In the child: enters the namespaces, then changes the user.
    pub(super) fn enter(&self) -> io::Result<()> {
        unshare(self.namespaces.difference(CloneFlags::CLONE_NEWPID))?;
        if self.namespaces.contains(CloneFlags::CLONE_NEWNS) {
            // Receives the host's unmounts, so that it keeps no filesystem busy, and sends none of its own.
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
            if let Some(loader) = &self.loader {
                loader.mount()?;
            }
            if self.read_only {
                protect_mounts()?;
            }
            // A working directory elsewhere would stay reachable when the root is taken away.
            chdir("/")?;
        }
        if let Some(User { uid, gid, groups }) = &self.user {
            become_user(*uid, *gid, groups)?;
        }
        Ok(())
    }

    /// In the child, last: the program and what starts it can only do what the filter allows, and a user's resources are
    /// limited also where the sandbox's cgroup has no limits.
    pub(super) fn restrict(&self) -> io::Result<()> {
        if self.user.is_some() {
            lower(Resource::RLIMIT_NPROC, TASKS_MAX)?;
            lower(Resource::RLIMIT_NOFILE, OPEN_MAX)?;
        }
        prctl::set_no_new_privs()?;
        self.capabilities.map_or(Ok(()), keep_capabilities)?;
        self.filter.as_ref().map_or(Ok(()), Filter::install)
    }
}

/// Lowers a limit for good: without capabilities, a process cannot raise it.
fn lower(resource: Resource, most: u64) -> io::Result<()> {
    let (soft, hard) = getrlimit(resource)?;
    Ok(setrlimit(resource, soft.min(most), hard.min(most))?)
}

/// Makes all mounts of the process's namespace read-only, and the devices on them useless. Descriptors that are open keep
/// their rights.
fn protect_mounts() -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is zero-terminated, and the structure is as long as stated. Both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

/// Takes all other capabilities from the programs that this process starts: root's are bounded by the bounding set
/// (capabilities(7)).
fn keep_capabilities(kept: u64) -> io::Result<()> {
    for capability in (0..u64::BITS).filter(|capability| kept >> capability & 1 == 0) {
        // SAFETY: the call takes numbers.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) }) {
            Ok(_) => {}
            // The kernel has no more.
            Err(Errno::EINVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads as many IDs as the slice has. Not nix's function: its IDs would have to be allocated.
    let set = unsafe { libc::setgroups(groups.len(), groups.as_ptr()) };
    Errno::result(set)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(())
}
