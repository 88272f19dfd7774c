//! Gives a running process an empty root, from outside: the process needs no privileges for it, and cannot prevent it.
//!
//! pivot_root(2) changes the root and the working directory of every process of the mount namespace that has the old
//! root. What the process has mapped or opened of the old root's files stays with it. A folder would be a way out, so it
//! must have none open.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::fchdir;

use super::tmpfs;
use crate::host::lock::is_same;
use crate::host::process::ProcessId;
use crate::host::thread::with_own_root;

const OWN: &str = "/proc/self/ns/mnt";

/// A file in a root that is otherwise empty.
#[derive(Clone, Debug)]
pub(crate) struct RootFile {
    /// Its folder below the root.
    pub(crate) folder: &'static str,
    /// Its name.
    pub(crate) name: &'static str,
    /// Its contents.
    pub(crate) contents: Vec<u8>,
}

/// Replaces the root of a process's mount namespace by a read-only one that has only `files`. Blocks.
///
/// # Errors
/// When the process has exited or has no mount namespace of its own, or a system call fails.
pub(crate) fn empty(process: ProcessId, files: &[RootFile]) -> io::Result<()> {
    let namespace = process.mount_namespace()?;
    // The caller would lose its own root.
    if is_same(&fs::metadata(OWN)?, &namespace.metadata()?) {
        return Err(io::Error::other("the process is in the caller's mount namespace"));
    }
    with_own_root(|| {
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        let root = create(files)?;
        let folder = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let old = open("/", folder, Mode::empty())?;
        tmpfs::mount_over_root(root.as_raw_fd())?;
        fchdir(&root)?;
        // With both paths the same, the old root comes to lie on top of the new one (pivot_root(2), "Notes").
        nix::unistd::pivot_root(".", ".")?;
        fchdir(&old)?;
        umount2(".", MntFlags::MNT_DETACH)?;
        Ok(())
    })?;
    // A mount on top of the old root would have taken its place.
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid))?.lines().count();
    if mounts == 1 { Ok(()) } else { Err(io::Error::other(format!("the process has {mounts} mounts instead of one"))) }
}

/// The new root, mounted nowhere yet.
fn create(files: &[RootFile]) -> io::Result<OwnedFd> {
    let restricted = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let root = tmpfs::create(restricted)?;
    for RootFile { folder, name, contents } in files {
        match mkdirat(&root, *folder, Mode::from_bits_truncate(0o755)) {
            Err(Errno::EEXIST) => {}
            made => made?,
        }
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let path = CString::new(format!("{folder}/{name}"))?;
        let file = openat(&root, path.as_c_str(), flags, Mode::from_bits_truncate(0o644))?;
        File::from(file).write_all(contents)?;
    }
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let empty: &CStr = c"";
    // SAFETY: the path is a zero-terminated string, and the size is that of the structure. Both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result)?;
    Ok(root)
}
