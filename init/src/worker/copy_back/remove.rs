//! Removes what the container has removed.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::pair::{SELF, reopen};

/// Removes an entry of a folder, with everything in it. Returns false if there was none.
///
/// # Errors
/// Those of unlinkat(2). A part of a folder may be gone then.
pub(super) fn remove(folder: &OwnedFd, name: &CStr, depth: usize) -> io::Result<bool> {
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) => return Ok(true),
        // The host's overlayfs reports this too if it cannot hide a file of its lower layers.
        Err(Errno::ENOENT) => match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(false),
            _ => return Err(Errno::ENOENT.into()),
        },
        Err(Errno::EISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let depth = depth.checked_sub(1).ok_or(Errno::ELOOP)?;
    let inner = reopen(folder, name)?;
    // A folder that changes may not list an entry: until it is empty.
    loop {
        let mut removed = false;
        for entry in Dir::from_fd(reopen(&inner, SELF)?)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name != SELF && name != c".." {
                removed |= remove(&inner, name, depth)?;
            }
        }
        if !removed {
            break;
        }
    }
    unlinkat(folder, name, UnlinkatFlags::RemoveDir)?;
    Ok(true)
}
