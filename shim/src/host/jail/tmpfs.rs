//! A filesystem in memory that is mounted nowhere yet.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

/// linux/mount.h.
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
/// The largest file is a program's loader.
const SIZE: &CStr = c"4m";

/// Creates the filesystem, with a root folder that only root may change. `attributes` are those of its mount
/// (`MOUNT_ATTR_*`).
///
/// # Errors
/// Those of the system calls.
pub(super) fn create(attributes: u64) -> io::Result<OwnedFd> {
    // SAFETY: the name is zero-terminated and outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in [(c"mode", c"0555"), (c"size", SIZE)] {
        configure(&context, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    // SAFETY: the call takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
}

fn configure(context: &OwnedFd, command: u32, key: *const libc::c_char, value: *const libc::c_char) -> io::Result<()> {
    // SAFETY: key and value are zero-terminated strings that outlive the call, or null where the command takes none.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    Ok(Errno::result(result).map(drop)?)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    // SAFETY: the kernel has just created the descriptor, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(Errno::result(fd)? as RawFd) })
}

/// Mounts it over the caller's root. The caller, and what it looks up from its root, does not see it there.
///
/// # Errors
/// Those of move_mount(2).
pub(super) fn mount_over_root(mount: RawFd) -> io::Result<()> {
    // SAFETY: both paths are zero-terminated strings.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount,
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Ok(Errno::result(result).map(drop)?)
}
