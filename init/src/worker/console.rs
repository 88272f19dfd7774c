//! How a process gets its terminal, and PID 1 the terminal's other end.
//!
//! libcontainer opens the pty in the container's own devpts and sends its master to a socket. It knows nothing of the terminal's size or
//! owner, and an exec runs at once. So the process waits at a gate, a pipe, before it becomes its program, until PID 1 has taken the
//! master and made the terminal ready.

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::UnixListener;

use super::GATE_FD;
use crate::places;

/// PID 1's end while a process with a terminal is being made.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    listener: UnixListener,
    gate: OwnedFd,
}

impl Console {
    /// Makes the socket and the gate. The answer's second half is the process's, for its worker's streams.
    ///
    /// # Errors
    /// When descriptors or memory run out.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (theirs, gate) = pipe2(OFlag::O_CLOEXEC)?;
        let path = Path::new(places::RUN).join(format!("console-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let listener = UnixListener::bind(&path)?;
        Ok((Self { path, listener, gate }, theirs))
    }

    /// Where the worker sends the master.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master; as long as the worker lives, which has a deadline.
    ///
    /// # Errors
    /// When something else than one descriptor came.
    pub async fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        stream.async_io(Interest::READABLE, || take_descriptor(stream.as_raw_fd())).await
    }

    /// Lets the process go on. Without it, it ends when this is dropped.
    ///
    /// # Errors
    /// When it is gone.
    pub fn open_gate(&self) -> io::Result<()> {
        nix::unistd::write(&self.gate, b"\n")?;
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "remove a console's socket");
        }
    }
}

/// The one descriptor of a message (SCM_RIGHTS, unix(7)). More than one do not fit, and the kernel closes them.
fn take_descriptor(socket: i32) -> io::Result<OwnedFd> {
    let (mut text, mut space) = ([0; 64], cmsg_space!(i32));
    let mut parts = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no terminal came with the message"))
}

/// In the worker: keeps the gate from programs that are run on the way, as hooks are.
///
/// # Errors
/// When PID 1 gave none.
pub fn keep_gate() -> io::Result<()> {
    // SAFETY: a worker has its gate, if any, on this descriptor, and closes it nowhere.
    let gate = unsafe { BorrowedFd::borrow_raw(GATE_FD) };
    fcntl(gate, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// In the process: waits until PID 1 has made the terminal ready.
///
/// # Errors
/// When PID 1 has given it up.
pub fn pass_gate() -> io::Result<()> {
    // SAFETY: the process has inherited the worker's gate on this descriptor, and nothing in it uses it but this call.
    let mut gate = File::from(unsafe { OwnedFd::from_raw_fd(GATE_FD) });
    gate.read_exact(&mut [0])
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg};

    use super::*;

    #[test]
    fn one_descriptor_is_taken_and_anything_else_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let send = |fds: &[i32]| {
            let rights = [ControlMessage::ScmRights(fds)];
            let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
            sendmsg::<UnixAddr>(theirs.as_raw_fd(), &[IoSlice::new(b"x")], rights, MsgFlags::empty(), None).unwrap();
        };
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        send(&[write.as_raw_fd()]);
        drop(write);
        nix::unistd::write(take_descriptor(ours.as_raw_fd()).unwrap(), b"through").unwrap();
        let mut text = String::new();
        File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through", "and nobody else has it");
        send(&[]);
        assert_eq!(take_descriptor(ours.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
