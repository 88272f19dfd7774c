//! A folder of the layer, and the one to which it belongs.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};

use crate::attributes::kind;

/// Marks a folder that hides the one below (Documentation/filesystems/overlayfs.rst).
pub(super) const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// The folder itself.
pub(super) const SELF: &CStr = c".";

/// A folder of the upper layer, and the one to which it belongs.
pub(super) struct Pair {
    pub(super) upper: OwnedFd,
    pub(super) target: OwnedFd,
    /// The overlay shows nothing but the upper folder's entries.
    pub(super) exact: bool,
    /// The other one was empty before.
    pub(super) new: bool,
}

/// Opens a folder of a folder, or the same one again for another reading of its entries.
pub(super) fn reopen(folder: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

/// Whether an entry of a layer hides one of the layers below (Documentation/filesystems/overlayfs.rst).
pub(super) fn is_whiteout(stat: &FileStat) -> bool {
    kind(stat) == SFlag::S_IFCHR && stat.st_rdev == 0
}

/// Whether something has this name.
pub(super) fn exists_in(folder: &OwnedFd, name: &CStr) -> io::Result<bool> {
    match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
