//! Removes a directory tree without crossing a mount point or following a symbolic link: either may lead to a
//! container's root filesystem or to a host directory that was shared with the container.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// husk's own directories are at most five levels deep. Each level holds a file descriptor.
const MAX_DEPTH: u32 = 32;

/// Removes `path` and everything in it. A missing `path` is not an error. Entries beside a mount point are removed.
///
/// # Errors
/// `CrossesDevices` if `path` is or contains a mount point; otherwise the system's error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{}: not a directory's path", path.display())));
    };
    match fs::File::open(parent) {
        Ok(parent) => remove_at(parent.as_fd(), name.as_bytes(), 0),
        Err(e) if is_gone(&e) => Ok(()),
        Err(e) => Err(e),
    }
}

fn remove_at(parent: std::os::fd::BorrowedFd<'_>, name: &[u8], depth: u32) -> io::Result<()> {
    let kind = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()),
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(named(name, e)),
    };
    if kind != SFlag::S_IFDIR {
        return ignore_missing(name, unlinkat(parent, name, UnlinkatFlags::NoRemoveDir));
    }
    if depth == MAX_DEPTH {
        return Err(named(name, Errno::ELOOP));
    }
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
    let fd: OwnedFd = openat2(parent, name, how).map_err(|e| named(name, e))?;
    let mut dir = Dir::from_fd(fd).map_err(|e| named(name, e))?;
    // Read all names first: removing entries while reading may skip some.
    let names: Vec<_> = dir
        .iter()
        .map(|entry| entry.map(|entry| entry.file_name().to_bytes().to_vec()))
        .filter(|entry| !matches!(entry.as_deref(), Ok(b"." | b"..")))
        .collect::<Result<_, _>>()
        .map_err(|e| named(name, e))?;
    let mut first_error = None;
    for child in names {
        if let Err(e) = remove_at(dir.as_fd(), &child, depth + 1) {
            first_error.get_or_insert(e);
        }
    }
    match first_error {
        Some(e) => Err(e),
        None => ignore_missing(name, unlinkat(parent, name, UnlinkatFlags::RemoveDir)),
    }
}

fn ignore_missing(name: &[u8], result: nix::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(named(name, e)),
    }
}

fn named(name: &[u8], e: Errno) -> io::Error {
    let name = String::from_utf8_lossy(name);
    let source = io::Error::from(e);
    match e {
        Errno::EXDEV | Errno::EBUSY => io::Error::new(io::ErrorKind::CrossesDevices, format!("{name}: a mount point")),
        _ => io::Error::new(source.kind(), format!("{name}: {source}")),
    }
}

/// Whether the error means that the path does not exist.
pub(super) fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::NotADirectory
}
