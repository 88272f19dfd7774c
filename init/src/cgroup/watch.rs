//! Files of a cgroup whose changes the kernel tells of: `cgroup.events` and `memory.events` (cgroup-v2.rst).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::uio::pread;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::io::watch_fd;

/// Most bytes that are read of such a file. They have some ten short lines.
const MOST: usize = 1024;

/// An open file that can be read again and again, and waited for.
#[derive(Debug)]
pub struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    /// Opens it.
    ///
    /// # Errors
    /// What open(2) or epoll(7) said.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(watch_fd(File::open(path)?.into(), Interest::PRIORITY)?))
    }

    /// What is in it now.
    ///
    /// # Errors
    /// ENODEV when its group is gone.
    pub fn read(&self) -> io::Result<String> {
        let mut bytes = [0; MOST];
        let length = pread(self.0.get_ref(), &mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }

    /// Waits for the next change. One between a [`Watched::read`] and the wait ends the wait at once.
    ///
    /// # Errors
    /// When the runtime is on its way out.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// Waits until `line` is one of its lines.
    ///
    /// # Errors
    /// As [`Watched::read`].
    pub async fn until(&self, line: &str) -> io::Result<()> {
        while !self.read()?.lines().any(|one| one == line) {
            self.changed().await?;
        }
        Ok(())
    }
}
