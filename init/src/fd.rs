//! File descriptors in the async runtime.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When epoll rejects the descriptor. The error contains it.
pub(crate) fn watch_fd(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: an OwnedFd stays open and unchanged as long as it lives, and AsyncFd lends it out only by reference.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
}

/// Makes the open file of a descriptor non-blocking, for everyone who shares it.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> nix::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}
