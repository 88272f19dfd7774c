//! Removes what an earlier copy has created and the container has removed since.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstatat};

use super::copier::Copier;
use super::pair::{OPAQUE, Pair, exists_in};
use super::record::{self, Record};
use super::remove;
use crate::attributes::{Entry, kind};

/// An overlay of images, and the folder of the record.
pub(super) struct OfImages {
    pub(super) merged: OwnedFd,
    pub(super) folder: OwnedFd,
}

impl Copier {
    /// Removes what an earlier copy has created and the overlay `merged` does not show any more. Notes the rest again.
    pub(super) fn remove_gone(&mut self, pair: &Pair, images: &OfImages, depth: usize) -> io::Result<()> {
        let OfImages { merged, folder } = images;
        for path in record::former(folder)? {
            let path = path?;
            self.path = Path::new(OsStr::from_bytes(&path)).to_owned();
            if let Err(error) = self.check(pair, merged, &path, depth) {
                self.created()?;
                self.note(error)?;
            }
        }
        self.path.clear();
        self.record.as_ref().map_or(Ok(()), Record::replace_former)
    }

    fn check(&mut self, pair: &Pair, merged: &OwnedFd, path: &[u8], depth: usize) -> io::Result<()> {
        let at = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = at.map_or((&b"."[..], path), |at| (&path[..at], &path[at + 1..]));
        let name = CString::new(name)?;
        let shown = match parent_in(merged, parent)? {
            Some(folder) => exists_in(&folder, &name)?,
            None => false,
        };
        if !shown {
            // Without its folder, it is gone too.
            if let Some(folder) = parent_in(&pair.target, parent)?
                && remove::remove(&folder, &name, depth)?
            {
                self.report.entries += 1;
            }
            return Ok(());
        }
        // No image has a folder here: this one is complete, even if it was removed and created again.
        if let Some(folder) = parent_in(&pair.upper, parent)?
            && fstatat(&folder, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| kind(&stat) == SFlag::S_IFDIR)
        {
            Entry { folder: &folder, name: &name }.set(OPAQUE, b"y")?;
        }
        self.created()
    }
}

/// Opens the folder in which something is, without following links. None if it does not exist.
fn parent_in(root: &OwnedFd, path: &[u8]) -> io::Result<Option<OwnedFd>> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    match openat2(root, path, how) {
        Ok(folder) => Ok(Some(folder)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
