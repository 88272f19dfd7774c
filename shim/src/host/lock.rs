//! Locks that processes of the host share: flock(2) on a file or folder that its last user removes.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// How long to wait for a lock: a holder lists a folder, or removes a cgroup.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to lock: flock(2) has no deadline.
const PAUSE: Duration = Duration::from_millis(2);

/// Locks what `open` opens at `path`. `open` returns `None` to be called again, because the last user has removed
/// something in between.
///
/// # Errors
/// That of `open`; `TimedOut` or EWOULDBLOCK after `within`.
pub(crate) fn lock(
    path: &Path,
    within: Duration,
    open: impl Fn() -> io::Result<Option<File>>,
) -> io::Result<Flock<File>> {
    let deadline = Instant::now() + within;
    loop {
        let opened = open()?;
        let in_time = Instant::now() < deadline;
        match opened.map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock)) {
            // It may have been removed, and created again, before the lock was taken.
            Some(Ok(lock)) if is_at(&lock, path)? => return Ok(lock),
            None | Some(Ok(_) | Err((_, Errno::EWOULDBLOCK | Errno::EINTR))) if in_time => {}
            None | Some(Ok(_)) => return Err(io::ErrorKind::TimedOut.into()),
            Some(Err((_, errno))) => return Err(errno.into()),
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether an open file is still the one at `path`.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(found) => Ok(is_same(&found, &file.metadata()?)),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether an operation failed because its path leads nowhere any more.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Whether both are of the same file.
pub(crate) fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
