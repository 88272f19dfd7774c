//! Finds that a layer changes nothing, which is cheap enough for PID 1: a worker would take longer than the container did.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use nix::dir::Dir;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstatat};

use super::file::has_incomplete;
use super::pair::{SELF, reopen};
use super::place::Folder;
use super::record;
use crate::attributes::{Entry, in_overlay};
use crate::error::CallError;

/// Whether the layer `upper` has no entries, and its folder the attributes of `target`, and no earlier copy has created
/// anything that `target` may have to lose. Reads a few entries at most. Times of access are not compared.
///
/// # Errors
/// A folder cannot be opened or read.
pub(crate) fn is_nothing(upper: &Folder, target: &Folder) -> Result<bool, CallError> {
    let disk = upper.beside().open("disk of the upper layer")?;
    let (upper, target) = (upper.open("upper layer")?, target.open("filesystem")?);
    compare(&disk, &upper, &target).map_err(|error| CallError::internal("look for changes to copy back", &error))
}

fn compare(disk: &OwnedFd, upper: &OwnedFd, target: &OwnedFd) -> io::Result<bool> {
    // First what asks the host nothing.
    if !is_empty(upper)? || record::exists(disk)? {
        return Ok(false);
    }
    let stat = |folder: &OwnedFd| fstatat(folder, SELF, AtFlags::empty());
    let seen = |stat: FileStat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_mtime, stat.st_mtime_nsec);
    if seen(stat(upper)?) != seen(stat(target)?) {
        return Ok(false);
    }
    let of_upper = xattrs(upper, |name| in_overlay(&name))?;
    Ok(of_upper == xattrs(target, Some)? && !has_incomplete(target)?)
}

fn is_empty(folder: &OwnedFd) -> io::Result<bool> {
    for entry in Dir::from_fd(reopen(folder, SELF)?)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != SELF && name != c".." {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The extended attributes for which `rename` returns a name, in order.
fn xattrs(
    folder: &OwnedFd,
    rename: impl Fn(CString) -> Option<CString>,
) -> io::Result<Vec<(CString, Option<Vec<u8>>)>> {
    let entry = Entry { folder, name: SELF };
    let mut all = Vec::new();
    for name in entry.names()? {
        let value = entry.value(&name)?;
        all.extend(rename(name).map(|name| (name, value)));
    }
    all.sort();
    Ok(all)
}
