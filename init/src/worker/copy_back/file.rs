//! Creates one file as a copy of another.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mknodat};
use nix::unistd::{UnlinkatFlags, Whence, ftruncate, linkat, lseek64, symlinkat, unlinkat};

use super::copier::{Copier, LINKS_MAX, Link};
use super::pair::{Pair, exists_in};
use super::remove;
use crate::attributes::{Entry, copy_xattrs, in_overlay, kind, permissions};

/// The name of a file that is not complete, in the filesystem's root. One of a copy that was interrupted is removed by the
/// next. A file of a container that has this name is not copied.
const INCOMPLETE: &CStr = c".husk-copy-back";
/// Bytes that are copied at once: the largest request of virtio-fs.
const CHUNK: usize = 1 << 20;

/// Whether a copy was interrupted.
pub(super) fn has_incomplete(root: &OwnedFd) -> io::Result<bool> {
    exists_in(root, INCOMPLETE)
}

/// Removes the file that a copy has not completed.
pub(super) fn remove_incomplete(root: &OwnedFd) -> io::Result<()> {
    match unlinkat(root, INCOMPLETE, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Copier {
    /// Creates a copy of anything but a folder, in place of what has its name.
    pub(super) fn file(&mut self, pair: &Pair, name: &CStr, stat: &FileStat, depth: usize) -> io::Result<()> {
        if self.path.as_os_str().as_encoded_bytes() == INCOMPLETE.to_bytes() {
            return Err(io::Error::other("the name is reserved for husk"));
        }
        let has_names = stat.st_nlink > 1;
        if has_names && self.link(pair, name, stat, depth)? {
            return Ok(());
        }
        match self.create(pair, name, stat, &pair.target, name) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let root = self.root.try_clone()?;
                self.create(pair, name, stat, &root, INCOMPLETE)?;
                replace(&root, pair, name, depth)?;
            }
            other => other?,
        }
        if has_names && self.links.0.len() < LINKS_MAX {
            let link = Link { path: self.path.clone(), left: stat.st_nlink - 1 };
            self.links.0.insert(stat.st_ino, link);
        }
        Ok(())
    }

    /// Gives a file that has been copied another name. Returns false if it has not.
    fn link(&mut self, pair: &Pair, name: &CStr, stat: &FileStat, depth: usize) -> io::Result<bool> {
        let Some(link) = self.links.0.get_mut(&stat.st_ino) else { return Ok(false) };
        match linkat(&self.root, &link.path, &pair.target, name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                linkat(&self.root, &link.path, &self.root, INCOMPLETE, AtFlags::empty())?;
                replace(&self.root, pair, name, depth)?;
                // Both names may have been the same file already: then rename(2) has done nothing.
                remove_incomplete(&self.root)?;
            }
            Err(error) => return Err(error.into()),
        }
        link.left = link.left.saturating_sub(1);
        if link.left == 0 {
            self.links.0.remove(&stat.st_ino);
        }
        Ok(true)
    }

    /// Creates a complete copy as `new` in `folder`, or nothing.
    fn create(&mut self, pair: &Pair, name: &CStr, stat: &FileStat, folder: &OwnedFd, new: &CStr) -> io::Result<()> {
        let from = Entry { folder: &pair.upper, name };
        let to = Entry { folder, name: new };
        let content = self.create_empty(from, to, stat)?;
        let filled = (|| {
            // The root's file is its own user's: only a folder that is new gives its files nothing else.
            if !pair.new || (stat.st_uid, stat.st_gid) != (0, 0) || kind(stat) != SFlag::S_IFREG {
                to.set_owner_and_mode(stat)?;
            }
            if let Some((source, copy)) = &content {
                self.contents(source, copy, stat.st_size as u64)?;
                if permissions(stat).intersects(Mode::S_ISUID | Mode::S_ISGID) {
                    // Writing clears these bits.
                    to.set_owner_and_mode(stat)?;
                }
            }
            copy_xattrs(from, to, in_overlay, |attribute, error| self.rejected(attribute, &error))?;
            to.set_times(stat)
        })();
        filled.inspect_err(|_| {
            // The first error counts.
            let _ = unlinkat(folder, new, UnlinkatFlags::NoRemoveDir);
        })
    }

    /// Creates an entry without attributes. Returns the opened files, if they have contents.
    fn create_empty(&self, from: Entry<'_>, to: Entry<'_>, stat: &FileStat) -> io::Result<Option<(File, File)>> {
        match kind(stat) {
            SFlag::S_IFREG => {
                // O_NONBLOCK: the file may have been replaced by a fifo.
                let flags =
                    OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOATIME | OFlag::O_CLOEXEC;
                let source = openat(from.folder, from.name, flags, Mode::empty())?;
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let copy = openat(to.folder, to.name, flags, permissions(stat))?;
                Ok(Some((source.into(), copy.into())))
            }
            SFlag::S_IFLNK => {
                symlinkat(readlinkat(from.folder, from.name)?.as_os_str(), to.folder, to.name)?;
                Ok(None)
            }
            other => {
                mknodat(to.folder, to.name, other, permissions(stat), stat.st_rdev)?;
                Ok(None)
            }
        }
    }

    /// Copies contents, and leaves holes where there are some.
    fn contents(&mut self, from: &File, to: &File, size: u64) -> io::Result<()> {
        self.buffer.resize(CHUNK, 0);
        let mut at: u64 = 0;
        while at < size {
            let start = match lseek64(from, at as i64, Whence::SeekData) {
                Ok(start) => start as u64,
                // Only a hole is left.
                Err(Errno::ENXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let end = lseek64(from, start as i64, Whence::SeekHole)? as u64;
            at = start;
            while at < end {
                let most = (end - at).min(CHUNK as u64) as usize;
                match from.read_at(&mut self.buffer[..most], at)? {
                    // It has become shorter.
                    0 => return Ok(()),
                    length => {
                        to.write_all_at(&self.buffer[..length], at)?;
                        at += length as u64;
                        self.report.bytes += length as u64;
                    }
                }
            }
        }
        Ok(ftruncate(to, size as i64)?)
    }
}

/// Gives the complete file its name, which is that of an entry of the other kind or of an older file.
fn replace(root: &OwnedFd, pair: &Pair, name: &CStr, depth: usize) -> io::Result<()> {
    let found = fstatat(&pair.target, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind(&found) == SFlag::S_IFDIR {
        remove::remove(&pair.target, name, depth)?;
    }
    Ok(renameat(root, INCOMPLETE, &pair.target, name)?)
}
