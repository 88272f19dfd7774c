//! What the rewriting of a spec needs to know about the container and the host.

use std::io;
use std::path::{Path, PathBuf};

use crate::host::unix::Access;
use crate::rootfs::direct::DirectVolume;

/// The type of a file on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Dir,
    File,
    CharDevice { major: i64, minor: i64 },
    BlockDevice,
    Socket,
    Fifo,
}

/// A file on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFile {
    /// Absolute, with all symbolic links resolved.
    pub(crate) path: PathBuf,
    pub(crate) kind: FileKind,
}

/// A running container of the same sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// PID of its init in the guest.
    pub(crate) guest_pid: u32,
    /// Whether it uses the VM's network namespace, and not one of its own in the guest.
    pub(crate) in_vms_network: bool,
}

/// What the rewriting needs to know besides the spec.
pub(crate) struct Context<'a> {
    /// The container's ID, already validated.
    pub(crate) id: &'a str,
    /// The bundle's folder: the spec's relative paths start there.
    pub(crate) bundle: &'a Path,
    /// Whether the host has only cgroup v2.
    pub(crate) host_is_unified: bool,
    /// Looks up a path on the host and resolves symbolic links.
    pub(crate) inspect: &'a dyn Fn(&Path) -> io::Result<HostFile>,
    /// Checks a socket of the host, whose path contains no symbolic link. The error is the reason why a container may
    /// not mount it.
    pub(crate) check_socket: &'a dyn Fn(&Path) -> Result<Access, String>,
    /// Finds the volume that the bind mount of a path means, if the guest is to mount its filesystem. The error is the
    /// reason why it cannot be used.
    pub(crate) direct: &'a dyn Fn(&Path) -> Result<Option<DirectVolume>, String>,
    /// Destinations of bind mounts whose programs notice changes by the host.
    pub(crate) watch: &'a [PathBuf],
    /// Whether this is the sandbox's first container, for which the VM is booted.
    pub(crate) first: bool,
    /// Finds a running container of the sandbox by the PID of its holder.
    pub(crate) sibling: &'a dyn Fn(u32) -> Option<Sibling>,
}
