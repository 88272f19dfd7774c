//! File descriptors in the async runtime.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

/// An owner of a descriptor that stays open and unchanged as long as the owner lives.
pub(crate) trait Owner: AsRawFd {}

impl Owner for OwnedFd {}
impl Owner for Arc<OwnedFd> {}

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When epoll rejects the descriptor. The error contains it.
pub(crate) fn watch_fd<T: Owner>(fd: T, interest: Interest) -> Result<AsyncFd<T>, AsyncFdRegisterError<T>> {
    // SAFETY: the descriptor stays open and unchanged as long as its owner, which AsyncFd lends out only by reference.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
}

/// Makes the open file of a descriptor non-blocking, for everyone who shares it.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> nix::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}

/// Sets how many bytes a vsock connection may have on their way (`SO_VM_SOCKETS_BUFFER_SIZE`, linux/vm_sockets.h): Linux
/// limits both directions to it, whatever the other side has room for.
///
/// # Errors
/// Those of setsockopt(2).
pub(crate) fn set_vsock_buffer(socket: impl AsFd, bytes: u64) -> nix::Result<()> {
    // linux/vm_sockets.h
    const BUFFER_SIZE: i32 = 0;
    const BUFFER_MAX_SIZE: i32 = 2;
    for option in [BUFFER_MAX_SIZE, BUFFER_SIZE] {
        let (value, size) = (std::ptr::from_ref(&bytes).cast(), size_of::<u64>() as libc::socklen_t);
        // SAFETY: the descriptor is open, and the kernel reads `size` bytes of a number that lives until the return.
        let set = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), libc::AF_VSOCK, option, value, size) };
        Errno::result(set)?;
    }
    Ok(())
}

/// Moves bytes between a pipe and another descriptor within the kernel, without waiting. Returns 0 at the end.
///
/// # Errors
/// Those of splice(2); EAGAIN when there are no bytes, or no room for them.
pub(crate) fn splice(from: impl AsFd, to: impl AsFd, most: usize) -> nix::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: both descriptors are open, and without offsets the call touches no memory of the process.
    let moved =
        unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), most, libc::SPLICE_F_NONBLOCK) };
    Errno::result(moved).map(|moved| moved as usize)
}
