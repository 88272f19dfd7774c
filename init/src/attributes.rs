//! Owner, mode, times and extended attributes of files, to be copied from one filesystem to another. Symbolic links are
//! not followed.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lremovexattr, lsetxattr};

/// Prefix of overlayfs's own attributes. One of a container's program that has this prefix carries another
/// `overlay.` behind it (kernel, Documentation/filesystems/overlayfs.rst, "Nested overlayfs mounts").
const OVERLAY: &[u8] = b"trusted.overlay.";
/// What a file in a folder inherits from it.
pub(crate) const DEFAULT_ACL: &CStr = c"system.posix_acl_default";
/// Longest list of names, and longest value (xattr(7)).
const XATTR_MAX: usize = 64 * 1024;

/// An entry of an opened folder; `.` is the folder itself.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) folder: &'a OwnedFd,
    pub(crate) name: &'a CStr,
}

impl Entry<'_> {
    /// A path that leads to the entry: system calls for extended attributes take no descriptor of a folder.
    fn path(self) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}/", self.folder.as_raw_fd()).into_bytes();
        path.extend(self.name.to_bytes());
        path
    }

    /// The names of its extended attributes.
    ///
    /// # Errors
    /// Those of listxattr(2), except that a filesystem without extended attributes has none.
    pub(crate) fn names(self) -> io::Result<Vec<CString>> {
        let path = self.path();
        let mut list = Vec::with_capacity(256);
        let listed = loop {
            match llistxattr(path.as_slice(), rustix::buffer::spare_capacity(&mut list)) {
                Err(rustix::io::Errno::RANGE) if list.capacity() < XATTR_MAX => list.reserve(XATTR_MAX),
                other => break other,
            }
        };
        match listed {
            Ok(_) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
        names.map(|name| CString::new(name).map_err(io::Error::other)).collect()
    }

    /// The value of an extended attribute; `None` if it does not exist.
    ///
    /// # Errors
    /// Those of getxattr(2).
    pub(crate) fn value(self, name: &CStr) -> io::Result<Option<Vec<u8>>> {
        let path = self.path();
        let mut value = Vec::with_capacity(256);
        loop {
            match lgetxattr(path.as_slice(), name, rustix::buffer::spare_capacity(&mut value)) {
                Ok(_) => return Ok(Some(value)),
                Err(rustix::io::Errno::RANGE) if value.capacity() < XATTR_MAX => value.reserve(XATTR_MAX),
                Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Removes an extended attribute, which may not exist.
    ///
    /// # Errors
    /// Those of removexattr(2).
    pub(crate) fn remove(self, name: &CStr) -> io::Result<()> {
        match lremovexattr(self.path().as_slice(), name) {
            Ok(()) | Err(rustix::io::Errno::NODATA) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets an extended attribute.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub(crate) fn set(self, name: &CStr, value: &[u8]) -> io::Result<()> {
        Ok(lsetxattr(self.path().as_slice(), name, value, XattrFlags::empty())?)
    }

    /// Sets owner and mode. A symbolic link has no mode.
    ///
    /// # Errors
    /// Those of chown(2) and chmod(2).
    pub(crate) fn set_owner_and_mode(self, stat: &FileStat) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        fchownat(self.folder, self.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if !is_link(stat) {
            // After the change of owner, which clears the set-user-ID bit.
            fchmodat(self.folder, self.name, permissions(stat), FchmodatFlags::FollowSymlink)?;
        }
        Ok(())
    }

    /// Sets the times of the last access and of the last change of the contents.
    ///
    /// # Errors
    /// Those of utimensat(2).
    pub(crate) fn set_times(self, stat: &FileStat) -> io::Result<()> {
        let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
        let modified = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
        Ok(utimensat(self.folder, self.name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?)
    }
}

/// Permission bits, with those for set-user-ID, set-group-ID and sticky.
pub(crate) fn permissions(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode)
}

/// What kind of file it is.
pub(crate) fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn is_link(stat: &FileStat) -> bool {
    kind(stat) == SFlag::S_IFLNK
}

/// The name under which an attribute of a layer's file appears in its overlay; `None` for overlayfs's own.
pub(crate) fn in_overlay(name: &CStr) -> Option<CString> {
    match name.to_bytes().strip_prefix(OVERLAY) {
        None => Some(name.to_owned()),
        Some(rest) if rest.starts_with(b"overlay.") => CString::new([b"trusted.", rest].concat()).ok(),
        Some(_) => None,
    }
}

/// Whether overlayfs would take an attribute of a layer's file for its own.
pub(crate) fn is_overlays(name: &CStr) -> bool {
    name.to_bytes().starts_with(OVERLAY)
}

/// Gives an entry the extended attributes of another: those for which `rename` returns a name. Calls `rejected` for each
/// one that the filesystem does not accept.
///
/// # Errors
/// All other failures.
pub(crate) fn copy_xattrs(
    from: Entry<'_>,
    to: Entry<'_>,
    rename: impl Fn(&CStr) -> Option<CString>,
    mut rejected: impl FnMut(&CStr, io::Error),
) -> io::Result<Vec<CString>> {
    let mut set = Vec::new();
    for name in from.names()? {
        let Some(new_name) = rename(&name) else { continue };
        let Some(value) = from.value(&name)? else { continue };
        match to.set(&new_name, &value) {
            Ok(()) => {}
            Err(error) if is_rejection(&error) => rejected(&new_name, error),
            Err(error) => return Err(error),
        }
        set.push(new_name);
    }
    Ok(set)
}

/// Whether the filesystem cannot have such an attribute, and accepts the rest.
fn is_rejection(error: &io::Error) -> bool {
    let rejections = [Errno::EOPNOTSUPP, Errno::EPERM, Errno::EACCES, Errno::EINVAL, Errno::E2BIG, Errno::ERANGE];
    error.raw_os_error().is_some_and(|number| rejections.contains(&Errno::from_raw(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_overlayfs_are_told_from_those_of_programs() {
        let table = [
            (c"user.a", Some(c"user.a")),
            (c"trusted.a", Some(c"trusted.a")),
            (c"trusted.overlay.opaque", None),
            (c"trusted.overlay.origin", None),
            (c"trusted.overlay.overlay.opaque", Some(c"trusted.overlay.opaque")),
            (c"trusted.overlayed", Some(c"trusted.overlayed")),
        ];
        for (name, expected) in table {
            assert_eq!(in_overlay(name).as_deref(), expected, "{name:?}");
        }
    }
}
