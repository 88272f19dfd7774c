//! The steps of the journal and how each is undone: idempotently, within a deadline, without touching what others own.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::cid::Leases;
use super::images::ImageLeases;
use super::ports::PortLeases;
use super::tree::{self, is_gone};
use super::users::UserLeases;
use super::volumes::VolumeLeases;
use crate::host::cgroup::{self, User};
use crate::host::hooks;
use crate::host::hooks::{Hook, Subject};
use crate::host::process::ProcessId;
use crate::network::user::HostPort;
use crate::network::{self, Claim, loopback};

/// Shortest wait, even after the deadline: a process that receives SIGKILL is normally dead by then.
const MIN_WAIT: Duration = Duration::from_millis(100);

/// One effect on the host and the way to undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub(crate) enum Step {
    /// A process was started. Undo kills it and its children and waits until they are dead. Its parent still receives
    /// its exit status.
    Process {
        /// PID and start time: a later process with the same PID is not killed.
        #[serde(flatten)]
        id: ProcessId,
        /// The process's name in error messages and in the file.
        name: String,
    },
    /// A filesystem was mounted on `path`. Undo unmounts the topmost mount there, lazily if it is in use.
    Mount { path: PathBuf },
    /// A directory was created. Undo removes it; a directory that is not empty is an error.
    Dir { path: PathBuf },
    /// A directory was created that receives contents. Undo removes it with its contents; a mount point in it is an
    /// error and is not entered.
    Tree { path: PathBuf },
    /// A file, socket or symbolic link was created. Undo removes it and does not follow the link.
    File { path: PathBuf },
    /// A cgroup was created, with its directory at `path`. Undo kills the processes in it and removes it, unless other
    /// sandboxes use it by now.
    Cgroup {
        path: PathBuf,
        /// The sandbox; `None` in the state of a shim that did not share cgroups.
        #[serde(default)]
        user: Option<User>,
    },
    /// A parent cgroup was created, with its directory at `path`. Undo removes it unless others use it by now.
    CgroupParent { path: PathBuf },
    /// A CID was leased. Undo releases it.
    Cid {
        cid: u32,
        leases: Leases,
        /// The shim that leased it: undo does not release another shim's lease.
        shim: ProcessId,
    },
    /// A user ID was leased for the VM. Undo releases it.
    User {
        id: u32,
        leases: UserLeases,
        /// The shim that leased it: undo does not release another shim's lease.
        shim: ProcessId,
    },
    /// Host hooks may have run for a container. Undo runs its `poststop` hooks. This is the only step that may run
    /// twice: when the shim is killed right after the hooks. A failing hook is logged and is not an error (runtime.md,
    /// "Lifecycle").
    Hooks { container: Subject, poststop: Vec<Hook> },
    /// Redirects between the links of a network namespace and a VM's taps: removed.
    Network {
        claim: Claim,
        /// The VM, as its taps name it. Not `owner`: an entry of the journal has a field of that name.
        #[serde(default)]
        vm: String,
    },
    /// Ports of the host were leased. Undo releases them.
    Ports {
        ports: Vec<HostPort>,
        leases: PortLeases,
        /// The shim that leased them: undo does not release another shim's lease.
        shim: ProcessId,
    },
    /// Folders and files of the host were leased for a container that can write to them. Undo releases them.
    Volumes {
        container: String,
        leases: VolumeLeases,
        /// The shim that leased them: undo does not release another shim's lease.
        shim: ProcessId,
    },
    /// A disk's image was leased. Undo releases it. Its lock ends with the machine.
    Image {
        image: String,
        leases: ImageLeases,
        /// The shim that leased it: undo does not release another shim's lease.
        shim: ProcessId,
    },
    /// The rule that redirects a network namespace's own connections to the shim: removed.
    Loopback { claim: Claim, sandbox: String },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Process { id, name } => write!(f, "kill {name} (PID {})", id.pid),
            Step::Mount { path } => write!(f, "unmount {}", path.display()),
            Step::Dir { path } | Step::Tree { path } | Step::File { path } => write!(f, "remove {}", path.display()),
            Step::Cgroup { path, .. } | Step::CgroupParent { path } => write!(f, "remove cgroup {}", path.display()),
            Step::Cid { cid, .. } => write!(f, "release vsock CID {cid}"),
            Step::User { id, .. } => write!(f, "release the user ID {id}"),
            Step::Network { claim, .. } => write!(f, "disconnect the network namespace {}", claim.netns.display()),
            Step::Ports { ports, .. } => {
                let plural = if ports.len() == 1 { "" } else { "s" };
                let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
                write!(f, "release the host's port{plural} {}", ports.join(", "))
            }
            Step::Volumes { container, .. } => write!(f, "release the volumes of {container}"),
            Step::Image { image, .. } => write!(f, "release the disk image {image}"),
            Step::Loopback { claim, .. } => {
                write!(f, "remove the redirection of connections in the network namespace {}", claim.netns.display())
            }
            Step::Hooks { container, .. } => write!(f, "run the poststop hooks of {}", container.id),
        }
    }
}

impl Step {
    /// Undoes the step. A step that is undone already succeeds.
    pub(super) fn undo(&self, deadline: Instant) -> io::Result<()> {
        let remaining = || deadline.saturating_duration_since(Instant::now()).max(MIN_WAIT);
        match self {
            Step::Process { id, .. } => {
                // Kill the children explicitly: virtiofsd's worker is PID 1 of its own PID namespace, so the SIGTERM
                // that it requests for its parent's death has no effect, and the worker would keep serving.
                let children = id.children()?;
                id.kill(remaining())?;
                children.into_iter().try_for_each(|child| child.kill(remaining()).map(drop))
            }
            Step::Mount { path } => unmount(path),
            Step::Dir { path } => ignore_missing(fs::remove_dir(path)),
            Step::Tree { path } => tree::remove(path),
            Step::File { path } => ignore_missing(fs::remove_file(path)),
            Step::Cgroup { path, user } => cgroup::leave(path, user.as_ref(), remaining()),
            Step::CgroupParent { path } => match fs::remove_dir(path) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty || is_busy(&e) => Ok(()),
                other => ignore_missing(other),
            },
            Step::Network { claim, vm } => network::disconnect(claim, vm, remaining()).map_err(io::Error::other),
            Step::Loopback { claim, sandbox } => {
                loopback::release(claim, sandbox, remaining()).map_err(io::Error::other)
            }
            Step::Cid { cid, leases, shim } => leases.release(*cid, *shim).map_err(io::Error::other),
            Step::User { id, leases, shim } => leases.release(*id, *shim).map_err(io::Error::other),
            Step::Ports { ports, leases, shim } => leases.release(ports, *shim).map_err(io::Error::other),
            Step::Volumes { container, leases, shim } => leases.release(container, *shim).map_err(io::Error::other),
            Step::Image { image, leases, shim } => leases.release(image, *shim).map_err(io::Error::other),
            Step::Hooks { container, poststop } => {
                hooks::run_to_the_end(poststop, container, remaining());
                Ok(())
            }
        }
    }
}

fn is_busy(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EBUSY)
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if is_gone(&e) => Ok(()),
        other => other,
    }
}

fn unmount(path: &Path) -> io::Result<()> {
    // Try a normal unmount first: after it the filesystem is released, and containerd can remove the snapshot below.
    // It fails with EBUSY while virtiofsd holds files open for a guest that still caches them.
    let result = match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => umount2(path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
        other => other,
    };
    match result {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
