//! The steps of the journal, and how each is undone: idempotently, within a deadline, touching nothing that is not ours.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use super::cid::Leases;
use super::tree::{self, is_gone};
use crate::host::hooks;
use crate::host::hooks::{Hook, Subject};
use crate::host::process::ProcessId;

/// However late it is, each wait gets this much: a process that was sent SIGKILL is normally dead within it.
const LEAST_WAIT: Duration = Duration::from_millis(100);
/// First and longest pause between two attempts to remove a cgroup. cgroup v1 has nothing that tells when it is empty.
const CGROUP_PAUSE: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// One effect on the host, as it is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// A process was started: it and its children are killed, and their death awaited. Its exit status is left to its
    /// parent.
    Process {
        /// Pid and start time: a process that got the pid later is left alone.
        #[serde(flatten)]
        id: ProcessId,
        /// For the reader of errors and of the file.
        name: String,
    },
    /// Something was mounted on `path`: the topmost mount there is unmounted, lazily if it is in use.
    Mount {
        /// The mount point.
        path: PathBuf,
    },
    /// A folder was made: removed when it is empty, an error when it is not.
    Dir {
        /// The folder.
        path: PathBuf,
    },
    /// A folder was made and gets contents: all is removed, but a mount point in it is an error and is not entered.
    Tree {
        /// The folder.
        path: PathBuf,
    },
    /// A file, socket or link was made: it is removed, a link is not followed.
    File {
        /// The file.
        path: PathBuf,
    },
    /// A cgroup was made: what still runs in it is killed, then it is removed.
    Cgroup {
        /// Its folder below the hierarchy's mount point.
        path: PathBuf,
    },
    /// A cgroup was made on the way to another: removed if nobody else has come to use it.
    CgroupParent {
        /// Its folder below the hierarchy's mount point.
        path: PathBuf,
    },
    /// A CID was leased: it is given back.
    Cid {
        /// The CID.
        cid: u32,
        /// Where it is leased.
        leases: Leases,
        /// For whom: another's lease of it is left alone.
        shim: ProcessId,
    },
    /// Hooks of the host may have run for a container: its `poststop` hooks are run. They alone are run again when the shim is killed right
    /// after them. One that fails is logged and not an error (runtime.md, "Lifecycle").
    Hooks {
        /// What they are told of.
        container: Subject,
        /// The hooks.
        poststop: Vec<Hook>,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Process { id, name } => write!(f, "kill {name} (pid {})", id.pid),
            Step::Mount { path } => write!(f, "unmount {}", path.display()),
            Step::Dir { path } | Step::Tree { path } | Step::File { path } => write!(f, "remove {}", path.display()),
            Step::Cgroup { path } | Step::CgroupParent { path } => write!(f, "remove cgroup {}", path.display()),
            Step::Cid { cid, .. } => write!(f, "give back vsock CID {cid}"),
            Step::Hooks { container, .. } => write!(f, "run the poststop hooks of {}", container.id),
        }
    }
}

impl Step {
    /// Undoes the step; done already is done.
    pub(super) fn undo(&self, deadline: Instant) -> io::Result<()> {
        let left = || deadline.saturating_duration_since(Instant::now()).max(LEAST_WAIT);
        match self {
            Step::Process { id, .. } => {
                // virtiofsd's worker is PID 1 of a namespace of its own, so the SIGTERM that it asked for when its
                // parent dies does not reach it: it would serve on.
                let children = id.children()?;
                id.kill(left())?;
                children.into_iter().try_for_each(|child| child.kill(left()).map(drop))
            }
            Step::Mount { path } => unmount(path),
            Step::Dir { path } => gone_is_fine(fs::remove_dir(path)),
            Step::Tree { path } => tree::remove(path),
            Step::File { path } => gone_is_fine(fs::remove_file(path)),
            Step::Cgroup { path } => remove_cgroup(path, left()),
            Step::CgroupParent { path } => match fs::remove_dir(path) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty || is_busy(&e) => Ok(()),
                other => gone_is_fine(other),
            },
            Step::Cid { cid, leases, shim } => leases.release(*cid, *shim).map_err(io::Error::other),
            Step::Hooks { container, poststop } => {
                hooks::run_to_the_end(poststop, container, left());
                Ok(())
            }
        }
    }
}

fn is_busy(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EBUSY)
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if is_gone(&e) => Ok(()),
        other => other,
    }
}

fn unmount(path: &Path) -> io::Result<()> {
    // Not lazily at first: then the filesystem is really released when this returns, and containerd can remove the
    // snapshot below it. virtiofsd may hold files open for a guest that has not forgotten them yet.
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

fn remove_cgroup(path: &Path, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    let mut pause = CGROUP_PAUSE.0;
    loop {
        match fs::remove_dir(path) {
            Err(e) if is_busy(&e) && Instant::now() < deadline => {}
            Err(e) if is_busy(&e) => return Err(e),
            other => return gone_is_fine(other),
        }
        // Ours are dead by now; what is left here are children that they left behind.
        for pid in pids_in(path)? {
            // Read again by `of`, so a pid that was given away between the two reads is at most a process that is in
            // no danger: it is only killed if it is in this cgroup.
            if let Some(id) = ProcessId::of(pid)?
                && pids_in(path)?.contains(&pid)
            {
                id.kill(deadline.saturating_duration_since(Instant::now()).max(LEAST_WAIT))?;
            }
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(CGROUP_PAUSE.1);
    }
}

fn pids_in(cgroup: &Path) -> io::Result<Vec<u32>> {
    match fs::read_to_string(cgroup.join("cgroup.procs")) {
        // 0 stands for a process of another pid namespace: not ours.
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()),
        // ENODEV: the cgroup was removed while its file was open.
        Err(e) if is_gone(&e) || e.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}
