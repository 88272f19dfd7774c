//! What the rewriting of a spec needs to know about the container and the host.

use std::io;
use std::path::{Path, PathBuf};

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
    /// Whether this is the sandbox's first container, for which the VM is booted.
    pub(crate) first: bool,
    /// Whether a PID of the guest is the init of one of the sandbox's containers.
    pub(crate) is_init: &'a dyn Fn(u32) -> bool,
}
