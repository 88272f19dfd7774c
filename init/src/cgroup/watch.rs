//! Files of a cgroup that notify their readers of changes: `cgroup.events` and `memory.events` (cgroup-v2.rst).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::uio::pread;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::fd::watch_fd;

/// Most bytes read from such a file, which has about ten short lines.
const SIZE_MAX: usize = 1024;

/// An open file whose changes can be awaited.
#[derive(Debug)]
pub(super) struct EventsFile(AsyncFd<OwnedFd>);

impl EventsFile {
    /// # Errors
    /// Those of open(2) or epoll(7).
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(watch_fd(File::open(path)?.into(), Interest::PRIORITY)?))
    }

    /// Reads the current content.
    ///
    /// # Errors
    /// ENODEV when the group has been removed.
    pub(super) fn read(&self) -> io::Result<String> {
        let mut bytes = [0; SIZE_MAX];
        let length = pread(self.0.get_ref(), &mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }

    /// Waits for the next change. Returns at once when the file has changed since the last [`Self::read`].
    ///
    /// # Errors
    /// When the runtime shuts down.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// Waits until the file contains `line`.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub(super) async fn until(&self, line: &str) -> io::Result<()> {
        while !self.read()?.lines().any(|one| one == line) {
            self.changed().await?;
        }
        Ok(())
    }
}
