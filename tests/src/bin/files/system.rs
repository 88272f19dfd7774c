//! System calls and expectations of all checks.

use std::io;
use std::os::fd::AsRawFd;

/// Bytes of a block of every usual filesystem.
pub(crate) const BLOCK: usize = 4096;

/// A system call. The arguments that are addresses must be those of live memory of the size that the call expects.
pub(crate) fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: this program passes addresses of values that outlive the call.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as usize),
    }
}

/// A file's descriptor, as an argument of [`call`].
pub(crate) fn number(file: &impl AsRawFd) -> usize {
    file.as_raw_fd() as usize
}

/// An error with this text unless the condition holds.
pub(crate) fn expect(holds: bool, otherwise: impl Into<String>) -> io::Result<()> {
    if holds { Ok(()) } else { Err(io::Error::other(otherwise.into())) }
}
