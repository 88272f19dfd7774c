//! What earlier copies have created, of an overlay whose lower layers are images.
//!
//! An overlay hides a removed file of its lower layers with a whiteout, and a file that only the upper layer has disappears
//! without a trace. If the filesystem that the layer is applied to is the lower layer, a file that a copy has created is in
//! both from then on. Images do not change, so what a copy creates has to be remembered: on the disk of the upper layer,
//! beside it, for as long as there is such a disk.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;

use super::pair::exists_in;

/// The paths, each with a zero behind it.
const NAME: &CStr = c"copied";
/// The next ones, until they are complete.
const NEXT: &CStr = c"copied.new";

/// The record of a copy. Each path is written before something is created there: a copy may be interrupted.
pub(super) struct Record {
    folder: OwnedFd,
    file: File,
}

impl Record {
    /// Begins a record in a folder.
    pub(super) fn begin(folder: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&folder, NEXT, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into();
        Ok(Self { folder, file })
    }

    /// Notes that a copy creates, or has created, what is at this path.
    pub(super) fn note(&mut self, path: &[u8]) -> io::Result<()> {
        self.file.write_all(&[path, &[0]].concat())
    }

    /// Replaces the former record, of which everything that is still there has been noted.
    pub(super) fn replace_former(&self) -> io::Result<()> {
        Ok(renameat(&self.folder, NEXT, &self.folder, NAME)?)
    }
}

/// Whether a copy has noted something in a folder.
pub(super) fn exists(folder: &OwnedFd) -> io::Result<bool> {
    exists_in(folder, NAME)
}

/// The paths that the former copy has noted.
pub(super) fn former(folder: &OwnedFd) -> io::Result<impl Iterator<Item = io::Result<Vec<u8>>>> {
    let former = match openat(folder, NAME, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(former) => Some(BufReader::new(File::from(former))),
        Err(Errno::ENOENT) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(former.into_iter().flat_map(|former| former.split(0)))
}
